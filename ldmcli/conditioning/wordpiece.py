"""BERT's WordPiece tokenizer, built from its vocabulary: a token a line, or a tokenizer.json.

The rules (accents off, lower case, Chinese characters apart, punctuation apart) are those of transformers'
BertTokenizer for `bert-base-uncased`, with which the latent diffusion paper's text models were trained.
"""

import io
from functools import cached_property
from pathlib import Path
from typing import Any

from ldmcli.conditioning.tokenizer import ClipTokenizer, Vocabulary
from ldmcli.disk.opening import read_json, read_text, shown
from ldmcli.errors import BadDataError, MissingInputError, printable

VOCABULARY = "vocab.txt"
FOLDERS = ("tokenizer", "bert-base-uncased")  # beside a single file
_WHOLE = "tokenizer.json"
_MAX_BYTES = 16 << 20
_MARKS = ("[CLS]", "[SEP]")
_SPECIAL = ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")


class BertTokenizer(ClipTokenizer):
    """Prompts to token ids, as ClipTokenizer's, by WordPiece."""

    marks = _MARKS

    def __init__(
        self, vocabulary: Vocabulary, max_length: int, *, lowercase: bool = True, rows: int | None = None
    ) -> None:
        super().__init__(vocabulary, max_length, rows=rows)
        self.comma_id = vocabulary.ids.get(",")
        self._lowercase = lowercase

    @cached_property
    def _backend(self) -> Any:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

        ids = self._vocabulary.ids
        backend = Tokenizer(models.WordPiece(vocab=ids, unk_token="[UNK]", max_input_chars_per_word=100))
        backend.normalizer = normalizers.BertNormalizer(lowercase=self._lowercase)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.add_special_tokens([token for token in _SPECIAL if token in ids])
        return backend


def bert_tokenizer(folder: Path, max_length: int, rows: int) -> BertTokenizer:
    """The tokenizer in a diffusers `tokenizer/` folder. Raises MissingInputError where there is none, BadDataError for
    one that is damaged or not the text encoder's."""
    beside = folder / "tokenizer_config.json"
    settings = read_json(beside, _MAX_BYTES) if beside.is_file() else {}
    lowercase = settings.get("do_lower_case", True) is not False
    if (folder / VOCABULARY).is_file():
        return tokenizer_of_file(folder / VOCABULARY, max_length, rows, lowercase=lowercase)
    if not (folder / _WHOLE).is_file():
        said = f"{shown(folder)} has neither {VOCABULARY} nor {_WHOLE}"
        raise MissingInputError(f"{said}; the model folder is incomplete.")
    model = read_json(folder / _WHOLE, _MAX_BYTES).get("model")
    ids = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(ids, dict) or not all(type(number) is int and number >= 0 for number in ids.values()):
        raise BadDataError(f"{shown(folder / _WHOLE)} holds no table of token ids.")
    return _tokenizer(folder / _WHOLE, ids, max_length, rows, lowercase=lowercase)


def tokenizer_of_file(path: Path, max_length: int, rows: int, *, lowercase: bool = True) -> BertTokenizer:
    """The tokenizer of a vocabulary, a token a line in the order of their ids. Raises as `bert_tokenizer`."""
    lines = io.StringIO(read_text(path, _MAX_BYTES), newline=None)  # str.splitlines has other ends of lines too
    ids = {line.rstrip("\n"): i for i, line in enumerate(lines)}
    return _tokenizer(path, ids, max_length, rows, lowercase=lowercase)


def _tokenizer(path: Path, ids: dict[str, int], max_length: int, rows: int, *, lowercase: bool) -> BertTokenizer:
    lacking = [token for token in (*_MARKS, "[UNK]", "[PAD]") if token not in ids]
    if lacking:
        raise BadDataError(f"{shown(path)} is no vocabulary of BERT: it has no {lacking[0]}.")
    if max(ids.values()) >= rows:
        token = max(ids, key=lambda one: ids[one])
        raise BadDataError(
            f"{shown(path)} gives the token {printable(repr(token), 60)} the number {ids[token]}, and the text encoder "
            f"knows 0 to {rows - 1}; they are not of one model."
        )
    return BertTokenizer(Vocabulary(ids, [], "[PAD]", ()), max_length, lowercase=lowercase, rows=rows)
