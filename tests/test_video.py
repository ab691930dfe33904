"""Video files and the sources made of them."""

import importlib.abc
import logging
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from avd_jax.data import sources, video
from avd_jax.errors import UserError

CLIPS = Path(__file__).parents[2] / "shared" / "videos"


def moving_noise(frames=40, height=32, width=48, seed=0):
  """Frames that are all different, so that a wrong index shows."""
  rng = np.random.default_rng(seed)
  still = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
  film = np.stack([np.roll(still, 2 * i, 1) for i in range(frames)])
  film[:, :4] = (np.arange(frames) * 255 // frames)[:, None, None, None]
  return film


def encode(path, film, codec="libx264rgb", pixels="rgb24", rate=24, **options):
  with av.open(str(path), "w") as container:
    stream = container.add_stream(codec, rate=rate, options=options)
    stream.height, stream.width = film.shape[1:3]
    stream.pix_fmt = pixels
    for frame in film:
      picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
      container.mux(stream.encode(picture))
    container.mux(stream.encode(None))
  return path


def full_decode(path):
  with av.open(str(path)) as container:
    return np.stack(
      [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    )


def test_lossless_clip_is_the_frames_themselves(tmp_path):
  film = moving_noise()
  path = encode(tmp_path / "a.mp4", film, qp="0", g="7", bf="2")
  assert video.probe(path) == (40, 24.0, 32, 48)
  for start, frames, stride in [(0, 40, 1), (17, 5, 1), (39, 1, 1), (3, 9, 4)]:
    clip = video.read_clip(path, start, frames, stride)
    np.testing.assert_array_equal(clip, film[start::stride][:frames])


@pytest.mark.parametrize(
  ("name", "codec", "options"),
  [
    ("b_frames.mp4", "libx264", {"g": "9", "bf": "3"}),
    # Some of its frames are shown before the keyframe they come after.
    ("open_gop.mp4", "libx265", {"g": "12", "x265-params": "log-level=none"}),
    ("alt_ref.webm", "libvpx", {"g": "15", "auto-alt-ref": "1"}),
    # AVI keeps no presentation times: frames are found by decoding in order.
    ("untimed.avi", "libx264", {"g": "12", "bf": "2"}),
    ("mpeg4.mov", "mpeg4", {"g": "9", "bf": "2"}),
  ],
)
def test_any_clip_equals_the_full_decode(tmp_path, name, codec, options):
  # 64 or more a side: x265 writes outside its memory on smaller frames.
  film = moving_noise(40, 64, 96)
  path = encode(tmp_path / name, film, codec, "yuv420p", **options)
  truth = full_decode(path)
  assert video.probe(path)[0] == len(truth) == 40
  for start in range(39):
    np.testing.assert_array_equal(
      video.read_clip(path, start, 2), truth[start : start + 2]
    )


def test_variable_rate_is_indexed_by_frame(tmp_path):
  film = moving_noise(20)
  times = np.cumsum(np.random.default_rng(0).integers(1, 9, 20))
  path = tmp_path / "variable.mkv"
  with av.open(str(path), "w") as container:
    stream = container.add_stream("ffv1", rate=30)
    stream.height, stream.width, stream.pix_fmt = 32, 48, "bgr0"
    for frame, time in zip(film, times, strict=True):
      picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
      picture.pts = int(time)
      container.mux(stream.encode(picture))
    container.mux(stream.encode(None))
  assert video.probe(path).frames == 20
  np.testing.assert_array_equal(video.read_clip(path, 11, 3, 3), film[11::3])


def test_a_file_written_again_is_indexed_again(tmp_path):
  path = encode(tmp_path / "a.mp4", moving_noise(10), qp="0")
  assert video.probe(path).frames == 10
  encode(path, moving_noise(14), qp="0")
  assert video.probe(path).frames == 14


@pytest.mark.parametrize(
  "asked", [(39, 2, 1), (-1, 2, 1), (0, 0, 1), (0, 2, 0), (0, 21, 2)]
)
def test_frames_that_are_not_there_are_refused(tmp_path, asked):
  path = encode(tmp_path / "a.mp4", moving_noise(), qp="0")
  with pytest.raises(UserError, match=r"a\.mp4: asked for .* it has 40"):
    video.read_clip(path, *asked)


def test_what_is_no_video_is_named(tmp_path):
  with pytest.raises(UserError, match=r"gone\.mp4: no such file"):
    video.probe(tmp_path / "gone.mp4")
  (tmp_path / "junk.mp4").write_bytes(b"not a video" * 99)
  with pytest.raises(UserError, match=r"junk\.mp4: not a video"):
    video.probe(tmp_path / "junk.mp4")
  with av.open(str(tmp_path / "sound.mkv"), "w") as container:
    stream = container.add_stream("pcm_s16le", rate=8000)
    sound = av.AudioFrame.from_ndarray(
      np.zeros((1, 800), np.int16), "s16", "mono"
    )
    sound.sample_rate = 8000
    container.mux(stream.encode(sound))
    container.mux(stream.encode(None))
  with pytest.raises(UserError, match=r"sound\.mkv: no video stream"):
    video.probe(tmp_path / "sound.mkv")


def test_a_cut_file_gives_its_frames_or_an_error_never_others(tmp_path):
  film = moving_noise()
  path = encode(tmp_path / "a.mkv", film, "ffv1", "bgr0")
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])
  frames = video.probe(path).frames
  assert 10 < frames < 30
  np.testing.assert_array_equal(
    video.read_clip(path, frames - 3, 2), film[frames - 3 : frames - 1]
  )
  with pytest.raises(UserError, match=r"a\.mkv"):
    video.read_clip(path, frames, 1)


def test_resize_covers_and_crops_the_centre():
  ramp = np.linspace(0, 255, 96).astype(np.uint8)
  film = np.broadcast_to(ramp[None, None, :, None], (2, 32, 96, 3))
  small = video.resize_crop(np.ascontiguousarray(film), 16, 16)
  assert small.shape == (2, 16, 16, 3)
  assert small.dtype == np.uint8
  # The middle 32 of 96 columns, by pairs.
  expected = ramp[32:64].reshape(16, 2).mean(1)
  np.testing.assert_allclose(small[0, 8, :, 0], expected, atol=2)
  # One-pixel stripes average out; without antialiasing they would not.
  stripes = np.zeros((1, 64, 64, 3), np.uint8)
  stripes[:, :, ::2] = 255
  grey = video.resize_crop(stripes, 8, 8)[0, 1:-1, 1:-1]
  np.testing.assert_allclose(grey, 127.5, atol=3)
  assert video.resize_crop(film, 32, 96) is film


def test_bytes_and_floats_invert_each_other():
  pixels = np.arange(256, dtype=np.uint8)
  floats = video.to_float(pixels)
  assert floats.dtype == np.float32
  assert (floats.min(), floats.max()) == (-1, 1)
  np.testing.assert_array_equal(video.to_uint8(floats), pixels)
  np.testing.assert_array_equal(video.to_uint8(np.array([-3.0, 9])), [0, 255])


def read_animation(path):
  with Image.open(path) as image:
    frames = []
    for i in range(image.n_frames):
      image.seek(i)
      frames.append(np.asarray(image.convert("RGB")))
    return np.stack(frames), image.info["duration"]


def test_mp4_round_trip(tmp_path):
  # Smooth, since 4:2:0 halves the colour; odd sizes are padded to even ones.
  wave = np.linspace(0, 3, 33)
  film = np.sin(wave[:, None] + wave[None, :21]) + np.zeros((7, 1, 1))
  film = np.repeat(film[..., None], 3, -1) * np.linspace(1, 0, 7).reshape(
    -1, 1, 1, 1
  )
  path = tmp_path / "new" / "folder" / "a.mp4"
  video.write_video(path, film, fps=12.5)
  assert video.probe(path) == (7, 12.5, 34, 22)
  clip = video.to_float(video.read_clip(path, 0, 7))
  assert np.abs(clip[:, :33, :21] - film).mean() < 0.03
  np.testing.assert_allclose(clip[:, 33], clip[:, 32], atol=0.15)


def test_mkv_and_webp_keep_every_pixel(tmp_path):
  film = moving_noise(6, 15, 17)
  video.write_video(tmp_path / "a.mkv", film, fps=10)
  np.testing.assert_array_equal(video.read_clip(tmp_path / "a.mkv", 0, 6), film)
  video.write_video(tmp_path / "a.webp", film, fps=10, scale=2)
  frames, duration = read_animation(tmp_path / "a.webp")
  np.testing.assert_array_equal(frames, film.repeat(2, 1).repeat(2, 2))
  assert duration == 100


def test_gif_keeps_few_colours(tmp_path):
  film = np.zeros((5, 12, 12, 3), np.uint8)
  for i in range(5):
    film[i, 2 : 6 + i, i:8] = (200, 40 * i, 90)
  video.write_video(tmp_path / "a.GIF", film, fps=20, scale=3)
  frames, duration = read_animation(tmp_path / "a.GIF")
  assert duration == 50
  np.testing.assert_array_equal(frames, film.repeat(3, 1).repeat(3, 2))


def test_writing_refuses_what_it_cannot(tmp_path):
  film = moving_noise(2)
  with pytest.raises(UserError, match=r"cannot write '\.mpg'"):
    video.write_video(tmp_path / "a.mpg", film, 8)
  with pytest.raises(UserError, match=r"not \[f, h, w, 3\]"):
    video.write_video(tmp_path / "a.mp4", film[0], 8)


def test_side_by_side_places_every_pixel_and_marks_given_frames():
  left = moving_noise(4, 6, 8, seed=1)[None].repeat(2, 0)
  right = video.to_float(moving_noise(4, 6, 8, seed=2))[None].repeat(2, 0)
  film = video.side_by_side([left, right], ["truth", "model"], scale=3, given=2)
  assert film.dtype == np.uint8
  assert len(film) == 4

  def panels(page, panel):
    panel = panel.repeat(3, 0).repeat(3, 1)
    height, width = panel.shape[:2]
    return [
      (y, x)
      for y in range(page.shape[0] - height + 1)
      for x in range(page.shape[1] - width + 1)
      if (page[y, x] == panel[0, 0]).all()
      and (page[y : y + height, x : x + width] == panel).all()
    ]

  for frame in range(4):
    lefts = panels(film[frame], left[0, frame])
    rights = panels(film[frame], video.to_uint8(right)[0, frame])
    assert len(lefts) == len(rights) == 2
    assert [y for y, _ in lefts] == [y for y, _ in rights]
    assert lefts[0][1] + 24 < rights[0][1]
  y, x = lefts[0]
  assert (film[1, y - 1, x] == film[0, y - 1, x]).all()
  assert (film[1, y - 1, x] != film[2, y - 1, x]).any()
  # The label above and the counter below are drawn; the counter moves on.
  assert (film[:, : y - 2].max(axis=(1, 2)) > 200).all()
  assert (film[2] != film[3])[lefts[1][0] + 18 :].any()


def test_side_by_side_refuses_unequal_columns():
  film = moving_noise(4, 6, 8)
  with pytest.raises(UserError, match="one shape and a label"):
    video.side_by_side([film, film[:3]], ["a", "b"])
  with pytest.raises(UserError, match="one shape and a label"):
    video.side_by_side([film, film], ["a"])


# --- folders -----------------------------------------------------------------


def folder(path, lengths, **options):
  for i, length in enumerate(lengths):
    encode(path / f"clip{i}.mp4", moving_noise(length, seed=i), qp="0")
  return sources.VideoFolderSource(path, **options)


SHAPE = {"frames": 8, "height": 32, "width": 48}


def test_folder_gives_clips_of_its_files(tmp_path):
  film = moving_noise(13)
  (tmp_path / "deep" / "er").mkdir(parents=True)
  encode(tmp_path / "deep" / "er" / "B.MKV", film, "ffv1", "bgr0")
  encode(tmp_path / "a.mp4", moving_noise(9, seed=1), qp="0")
  (tmp_path / "a.txt").write_text("ein Bällchen\n", encoding="utf-8")
  (tmp_path / "notes.md").write_text("not a video")
  source = sources.VideoFolderSource(
    tmp_path, stride=2, **{**SHAPE, "frames": 5}
  )
  assert [p.name for p in source.paths] == ["a.mp4", "B.MKV"]
  assert source.captions == ["ein Bällchen", ""]
  middle = source[0]
  assert middle["caption"] == "ein Bällchen"
  assert middle["video"].dtype == np.float32
  np.testing.assert_array_equal(
    video.to_uint8(middle["video"]), moving_noise(9, seed=1)[::2]
  )
  starts = set()
  for seed in range(40):
    clip = source.clip(1, np.random.default_rng(seed))["video"]
    clip = video.to_uint8(clip)
    start = next(i for i in range(13) if (film[i] == clip[0]).all())
    np.testing.assert_array_equal(clip, film[start : start + 9 : 2])
    starts.add(start)
  assert starts == set(range(5))


def test_folder_picks_a_stride_for_a_rate(tmp_path):
  film = moving_noise(30)
  encode(tmp_path / "a.mp4", film, qp="0", rate=24)
  source = sources.VideoFolderSource(tmp_path, fps=8, **SHAPE)
  np.testing.assert_array_equal(
    video.to_uint8(source[0]["video"]), film[4:26:3]
  )


def test_folder_skips_and_names_what_it_cannot_use(tmp_path, caplog):
  (tmp_path / "bad.mp4").write_bytes(b"\0" * 500)
  (tmp_path / "._clip0.mp4").write_bytes(b"a desktop's leavings")
  with caplog.at_level(logging.WARNING):
    source = folder(tmp_path, [20, 5, 9], **SHAPE)
  assert [p.name for p in source.paths] == ["clip0.mp4", "clip2.mp4"]
  (line,) = caplog.messages
  assert "skipped 2 of 4" in line
  assert "bad.mp4" in line
  assert "clip1.mp4: 5 frames, 8 needed" in line


def test_folder_reads_on_when_a_file_goes_bad(tmp_path, caplog):
  source = folder(tmp_path, [20, 9], **SHAPE)
  other = source.clip(1, np.random.default_rng(3))["video"]
  source.paths[0].write_bytes(b"broken since")
  with caplog.at_level(logging.WARNING):
    for _ in range(3):
      rng = np.random.default_rng(3)
      np.testing.assert_array_equal(source.clip(0, rng)["video"], other)
  (line,) = caplog.messages
  assert "clip0.mp4" in line
  source.paths[1].unlink()
  with pytest.raises(UserError, match=r"2 in a row .*clip0\.mp4"):
    source[0]


def test_folder_refuses_with_one_line(tmp_path):
  with pytest.raises(UserError, match="no such folder"):
    sources.VideoFolderSource(tmp_path / "gone", **SHAPE)
  with pytest.raises(UserError, match="no such folder"):
    sources.VideoFolderSource("", **SHAPE)
  with pytest.raises(UserError, match="no video in it"):
    sources.VideoFolderSource(tmp_path, **SHAPE)
  (tmp_path / "bad.mp4").write_bytes(b"\0" * 500)
  with pytest.raises(UserError, match=r"none of its 1 video files.*bad\.mp4"):
    sources.VideoFolderSource(tmp_path, **SHAPE)
  with pytest.raises(
    UserError, match=r"shorter.*clip1\.mp4, has 7 frames and 8 are needed"
  ) as caught:
    folder(tmp_path, [5, 7], **SHAPE)
  assert "\n" not in str(caught.value)


def test_folder_refuses_a_caption_of_another_encoding(tmp_path):
  encode(tmp_path / "clip0.mp4", moving_noise(20), qp="0")
  (tmp_path / "clip0.txt").write_bytes("Bällchen".encode("latin-1"))
  with pytest.raises(UserError, match=r"clip0\.txt: not UTF-8"):
    sources.VideoFolderSource(tmp_path, **SHAPE)


def test_a_folder_kept_in_memory_gives_the_same_clips(tmp_path):
  plain = folder(tmp_path, [70, 30], stride=3, **SHAPE)
  kept = sources.VideoFolderSource(tmp_path, stride=3, cache_mb=1, **SHAPE)
  for i in range(2):
    for seed in range(4):
      a, b = (
        s.clip(i, np.random.default_rng(seed))["video"] for s in (plain, kept)
      )
      np.testing.assert_array_equal(a, b)
  for path in kept.paths:  # no longer needed
    path.unlink()
  kept[0], kept[1]
  with pytest.raises(UserError):
    plain[0]
  small = sources.VideoFolderSource.__new__(sources.VideoFolderSource)
  small.__setstate__(kept.__getstate__())  # as a worker process gets it
  with pytest.raises(UserError):
    small[0]


def test_folder_holds_out_files_whatever_the_clip_length(tmp_path, caplog):
  lengths = [40, 40, 9, 40, 40]
  every = folder(tmp_path, lengths, **SHAPE).paths
  splits = {}
  for frames in (8, 30):
    for split in ("train", "eval"):
      options = {**SHAPE, "frames": frames, "split": split, "eval_files": 2}
      source = sources.VideoFolderSource(tmp_path, **options)
      splits[frames, split] = set(source.paths)
  assert splits[8, "train"] | splits[8, "eval"] == set(every)
  assert len(splits[8, "eval"]) == 2
  assert not (splits[8, "train"] | splits[30, "train"]) & (
    splits[8, "eval"] | splits[30, "eval"]
  )
  caplog.clear()
  both = sources.VideoFolderSource(tmp_path, split="eval", **SHAPE)
  assert both.paths == every
  assert "reads the videos of training" in caplog.text
  with pytest.raises(UserError, match="eval_files=5 leaves none of 5"):
    sources.VideoFolderSource(tmp_path, eval_files=5, **SHAPE)


@pytest.mark.skipif(not CLIPS.is_dir(), reason="no recorded clips beside here")
def test_recorded_clips_read_exactly():
  source = sources.VideoFolderSource(CLIPS, frames=9, height=24, width=40)
  assert len(source) >= 3
  for index in range(len(source)):
    clip = source.clip(index, np.random.default_rng(index))["video"]
    assert clip.shape == (9, 24, 40, 3)
    assert clip.std() > 0.02
  path = min(source.paths, key=lambda p: p.stat().st_size)
  truth = full_decode(path)
  for start in np.random.default_rng(0).integers(0, len(truth) - 9, 3):
    np.testing.assert_array_equal(
      video.read_clip(path, int(start), 9), truth[start : start + 9]
    )


# --- TFDS --------------------------------------------------------------------


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
  """A prepared data set of six videos, the fourth a short one."""
  import tensorflow_datasets as tfds

  class TinyVideo(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      features = tfds.features.FeaturesDict(
        {
          "clip": {
            "frames": tfds.features.Tensor(
              shape=(None, 16, 24, 3), dtype=np.uint8
            )
          },
          "caption": tfds.features.Text(),
          "label": np.int64,
        }
      )
      return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, download):
      del download
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      for i in range(6):
        frames = moving_noise(3 if i == 3 else 12, 16, 24, seed=i)
        yield (
          i,
          {"clip": {"frames": frames}, "caption": f"clip {i}ö", "label": i},
        )

  data_dir = tmp_path_factory.mktemp("tfds")
  builder = TinyVideo(data_dir=data_dir, file_format="array_record")
  builder.download_and_prepare()
  return data_dir


KEYS = {"video_key": "clip/frames", "caption_key": "caption"}
TFDS_SHAPE = {"frames": 5, "height": 16, "width": 24}


class NoTensorFlow(importlib.abc.MetaPathFinder):
  """Makes TensorFlow impossible to import, installed or not."""

  def find_spec(self, name, path=None, target=None):
    if name.partition(".")[0] == "tensorflow":
      raise ModuleNotFoundError(name)


def test_tfds_reads_array_record_without_tensorflow(
  tfds_folder, monkeypatch, caplog
):
  assert "tensorflow" not in sys.modules
  monkeypatch.setattr(sys, "meta_path", [NoTensorFlow(), *sys.meta_path])
  version = tfds_folder / "tiny_video" / "1.0.0"
  by_name = sources.TfdsSource(
    "tiny_video", tfds_folder, "train", **TFDS_SHAPE, **KEYS
  )
  by_folder = sources.TfdsSource(
    "", version, "train", stride=2, **TFDS_SHAPE, **KEYS
  )
  assert len(by_name) == len(by_folder) == 6
  seen = set()
  for index in range(6):
    record = by_folder[index]
    seed = int(record["caption"].split()[1][0])
    assert record["caption"] == f"clip {seed}ö"
    np.testing.assert_array_equal(
      video.to_uint8(record["video"]), moving_noise(12, 16, 24, seed)[2:11:2]
    )
    rng = np.random.default_rng(index)
    assert by_name.clip(index, rng)["video"].shape == (5, 16, 24, 3)
    seen.add(seed)
  assert seen == {0, 1, 2, 4, 5}
  assert any("3 frames, 9 are needed" in line for line in caplog.messages)
  assert "tensorflow" not in sys.modules


def test_tfds_splits_by_slices(tfds_folder):
  halves = [
    sources.TfdsSource(
      "tiny_video",
      tfds_folder,
      split,
      **{**TFDS_SHAPE, "frames": 3},
      **KEYS,
    )
    for split in ("train[:50%]", "train[50%:]")
  ]
  names = [{half[i]["caption"] for i in range(len(half))} for half in halves]
  assert [len(n) for n in names] == [3, 3]
  assert not names[0] & names[1]


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"name": "no_such_set"}, "no_such_set.*cannot be opened"),
    ({"split": "test"}, "split 'test'.*cannot be opened"),
    ({"video_key": "clip/film"}, r"no feature 'clip/film'; it has \['frames'"),
    ({"video_key": "label"}, "feature 'label' is int64"),
    ({"caption_key": "text"}, r"no feature 'text'; it has \['caption'"),
    ({"fps": 8}, "give a stride"),
    ({"frames": 13}, None),
  ],
)
def test_tfds_refuses_with_one_line(tfds_folder, change, says):
  options = {"name": "tiny_video", "data_dir": tfds_folder, "split": "train"}
  options |= TFDS_SHAPE | KEYS | change
  if says is None:
    with pytest.raises(UserError, match=r"6 in a row.*13 are needed"):
      sources.TfdsSource(**options)[0]
    return
  with pytest.raises(UserError, match=says) as caught:
    sources.TfdsSource(**options)
  assert "\n" not in str(caught.value)


def test_what_a_crop_costs_is_told():
  assert video.cropped((480, 832), (480, 832)) == (0, 0)
  assert video.cropped((960, 1664), (480, 832)) == (0, 0)
  assert video.cropped((800, 400), (400, 400)) == (0.5, 0)
  assert video.cropped((90, 120), (30, 10)) == (0, 0.75)
  # A fraction of a pixel is how sizes are rounded, not a cut.
  assert video.cropped((481, 833), (480, 832)) == (0, 0)


@pytest.mark.parametrize("suffix", [".mkv", ".avi"])
def test_a_file_that_was_cut_off_has_less_than_it_says(suffix, tmp_path):
  noise = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), np.uint8)
  whole, part = tmp_path / f"whole{suffix}", tmp_path / f"part{suffix}"
  if suffix == ".mkv":
    video.write_video(whole, noise, 12)
  else:
    video._encode(whole, noise, 12, "mpeg4", "yuv420p", {})
  data = whole.read_bytes()
  part.write_bytes(data[: len(data) * 6 // 10])
  assert video.promised(whole) == video.probe(whole).frames == 40
  assert video.promised(part) == 40 > video.probe(part).frames
