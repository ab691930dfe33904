"""Prompts to tokens: cleaned, ended, cut aloud, padded."""

import sys
import warnings

import numpy as np
import pytest

from avd_jax.errors import UserError
from avd_jax.wan import tokenizer
from avd_jax.wan.tokenizer import EOS, PAD, UNKNOWN

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer")
  tokenizer.make_tiny(path / "tokenizer.json", 400)
  return path


def pieces(folder, tokens):
  """Tokens as text."""
  shipped = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  return [shipped.id_to_token(int(i)) for i in tokens]


def test_prompts_are_ended_and_padded(folder):
  prompts = ["a red ball bounces over the table.", ""]
  tokens, lengths = tokenizer.load(folder).encode(prompts, 32)
  assert tokens.shape == (2, 32)
  assert tokens.dtype == lengths.dtype == np.int32
  for row, length in zip(tokens, lengths, strict=True):
    assert row[length - 1] == EOS
    assert np.all(row[length:] == PAD)
    assert np.all(row[: length - 1] > UNKNOWN)
  assert lengths[1] == 1
  text = "".join(pieces(folder, tokens[0, : lengths[0] - 1]))
  assert text.replace("▁", " ") == f" {prompts[0]}"


def test_wan_pads_to_512(folder):
  tokens, _ = tokenizer.load(folder).encode(["a ball"])
  assert tokens.shape == (1, 512)


def test_what_the_vocabulary_lacks_becomes_bytes(folder):
  tokens, lengths = tokenizer.load(folder).encode(["球 😀"], 32)
  found = pieces(folder, tokens[0, : lengths[0]])
  as_bytes = lambda text: [f"<0x{byte:02X}>" for byte in text.encode()]
  assert found == ["▁", *as_bytes("球"), "▁", *as_bytes("😀"), "</s>"]


def test_a_long_prompt_is_cut_aloud_and_keeps_its_end(folder):
  loaded = tokenizer.load(folder)
  long, short = "a ball rolls " * 9, "a ball"
  whole = loaded.ids(long)
  cut = len(whole) - 8
  with pytest.warns(UserWarning, match=f"the last {cut} are cut") as said:
    tokens, lengths = loaded.encode([long, short], 8)
  assert len(said) == 1
  assert str(said[0].message).startswith("prompt 'a ball rolls a ball")
  assert list(tokens[0]) == [*whole[:7], EOS]
  assert list(lengths) == [8, len(loaded.ids(short))]


def test_a_prompt_that_just_fits_is_whole(folder):
  loaded = tokenizer.load(folder)
  whole = loaded.ids("a ball rolls")
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    tokens, _ = loaded.encode(["a ball rolls"], len(whole))
  assert list(tokens[0]) == whole


def test_a_file_that_cuts_and_pads_by_itself_hides_nothing(folder, tmp_path):
  shipped = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  shipped.enable_truncation(4)
  shipped.enable_padding(length=64)
  shipped.save(str(tmp_path / "tokenizer.json"))
  prompt = "a red ball rolls over the table"
  ids = tokenizer.load(tmp_path).ids(prompt)
  assert ids == tokenizer.load(folder).ids(prompt)


def test_tiny_is_the_same_file_every_time(folder, tmp_path):
  path = tmp_path / "new" / "tokenizer.json"
  tokenizer.make_tiny(path, 400)
  assert path.read_bytes() == (folder / "tokenizer.json").read_bytes()
  assert tokenizer.load(path).vocab_size == 400


@pytest.mark.parametrize("size", [100, 100_000])
def test_tiny_sizes_have_bounds(tmp_path, size):
  with pytest.raises(UserError, match=f"vocab_size {size}: give 288 to"):
    tokenizer.make_tiny(tmp_path / "tokenizer.json", size)


def test_spiece_model_where_there_is_no_json(tmp_path):
  sentencepiece = pytest.importorskip("sentencepiece")
  text = ["a red ball bounces over a green field and rolls away"] * 4
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(text),
    model_prefix=str(tmp_path / "spiece"),
    vocab_size=330,
    pad_id=PAD,
    eos_id=EOS,
    unk_id=UNKNOWN,
    bos_id=-1,
    byte_fallback=True,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  loaded = tokenizer.load(tmp_path)
  processor = sentencepiece.SentencePieceProcessor(
    model_file=str(tmp_path / "spiece.model")
  )
  prompt = "a red 球"
  tokens, lengths = loaded.encode([prompt], 32)
  found = tokens[0, : lengths[0]]
  assert list(found) == [*processor.encode(prompt), EOS]
  assert UNKNOWN not in found
  assert loaded.vocab_size == processor.get_piece_size()
  assert np.all(tokens[0, lengths[0] :] == PAD)


def test_json_comes_before_spiece_model(folder, tmp_path):
  (tmp_path / "tokenizer.json").write_bytes(
    (folder / "tokenizer.json").read_bytes()
  )
  (tmp_path / "spiece.model").write_text("never read")
  assert tokenizer.load(tmp_path).vocab_size == 400


@pytest.mark.parametrize("content", ['{"version": ', "{}", "[]"])
def test_a_damaged_json_is_named(tmp_path, content):
  path = tmp_path / "tokenizer.json"
  path.write_text(content)
  with pytest.raises(UserError, match=r"tokenizer\.json cannot be read"):
    tokenizer.load(tmp_path)


def test_a_damaged_spiece_model_is_named(tmp_path):
  pytest.importorskip("sentencepiece")
  (tmp_path / "spiece.model").write_text("no model")
  with pytest.raises(UserError, match=r"spiece\.model cannot be read"):
    tokenizer.load(tmp_path)


def test_no_tokenizer_is_named(tmp_path):
  for path in (tmp_path, tmp_path / "tokenizer.json"):
    with pytest.raises(UserError, match=f"no tokenizer at {path}"):
      tokenizer.load(path)


def test_a_tokenizer_without_an_end_is_refused(folder, tmp_path):
  other = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  other.post_processor = tokenizers.processors.TemplateProcessing("$A")
  other.save(str(tmp_path / "tokenizer.json"))
  with pytest.raises(UserError, match="does not end prompts with </s>"):
    tokenizer.load(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
  words = {"<unk>": 0, "<s>": 1, "</s>": 2}
  other = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
  other.save(str(tmp_path / "tokenizer.json"))
  with pytest.raises(UserError, match="is not umT5's"):
    tokenizer.load(tmp_path)


def test_no_room_for_the_end(folder):
  with pytest.raises(UserError, match="text length 0"):
    tokenizer.load(folder).encode(["a"], 0)


@pytest.mark.parametrize(
  ("raw", "cleaned"),
  [
    ("  a\t red \n\n ball ", "a red ball"),
    ("fish &amp;amp; chips &lt;b&gt;", "fish & chips <b>"),
    ("itâ€™s a cafÃ©", "it's a café"),
    ("&nbsp;a&nbsp;&nbsp;b", "a b"),
    ("一只猫，  奔跑", "一只猫, 奔跑"),
    ("", ""),
  ],
)
def test_clean(raw, cleaned):
  pytest.importorskip("ftfy")
  assert tokenizer.clean(raw) == cleaned


@pytest.mark.parametrize(
  ("library", "call"),
  [
    ("ftfy", lambda folder: tokenizer.clean("a")),
    ("tokenizers", tokenizer.load),
    ("tokenizers", lambda folder: tokenizer.make_tiny(folder / "x", 300)),
  ],
)
def test_the_missing_extra_is_named(monkeypatch, folder, library, call):
  monkeypatch.setitem(sys.modules, library, None)
  with pytest.raises(UserError, match=rf"{library}.*pip install 'avd_jax\[wan"):
    call(folder)
