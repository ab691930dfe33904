"""Measures how rollouts drift, and shows it.

`drift.frame_metrics` measures frames of a world's rollouts, `drift.summarize`
sums them up, `report.write_report` makes charts, a film and a page of them.
"""
