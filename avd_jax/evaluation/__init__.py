"""Measures how rollouts drift, and shows it.

`physics.frame_metrics` measures frames of a world's rollouts and whether they
obey its law, `drift.summarize` sums them up, `report.write_report` makes
charts, a film and a page of them.
"""
