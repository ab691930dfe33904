"""Where videos come from: drawn worlds, files, data sets; and the grain
pipeline that turns any of them into batches, sharded and resumable.

`worlds` draws, `video` reads and writes files, `sources` gives both and TFDS
one face (`len`, `clip`), `captions` makes tokens of text, `codec` turns pixels
into what a model sees and back, `aggregate` stores trajectories, `pipeline`
makes batches of a source.
"""
