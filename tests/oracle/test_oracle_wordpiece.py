"""Prompts become the tokens that transformers' BertTokenizer makes of them."""

from pathlib import Path
from typing import Any

import pytest
from paper_models import VOCABULARY

from ldmcli.conditioning.chunks import tokenize
from ldmcli.conditioning.wordpiece import bert_tokenizer, tokenizer_of_file
from ldmcli.errors import BadDataError, MissingInputError

TEXTS = [
    "", "A red apples, on a blue cafe.", "CAFÉ café\tcafe\u0301", "中red中", "[MASK] [CLS]a[SEP] [PAD]", "a" * 120,
    "red\u200bred \ufffd\x01red", "a.b,c", " red  ", "🦊 fox", "ﬁ ß İ", "red " * 90, "[mask]", "a\nb\r\n",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("wordpiece")
    (found / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return found


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from transformers import BertTokenizer

    found = BertTokenizer(str(folder / "vocab.txt"), do_lower_case=True)
    found.save_pretrained(folder / "whole")
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_tokens(text: str, folder: Path, theirs: Any) -> None:
    expected = theirs(text, truncation=True, max_length=77, padding="max_length")["input_ids"]
    (chunk,) = tokenize(tokenizer_of_file(folder / "vocab.txt", 77, len(VOCABULARY)), text).chunks
    assert list(chunk.ids) == expected


def test_a_folder_may_have_the_vocabulary_in_one_file_of_its_own(folder: Path, theirs: Any) -> None:
    assert not (folder / "whole" / "vocab.txt").exists()
    found = bert_tokenizer(folder / "whole", 77, len(VOCABULARY))
    assert found.tokens("A red apples").ids == theirs("A red apples", add_special_tokens=False)["input_ids"]


def test_a_prompt_that_is_cut_says_where(folder: Path) -> None:
    ours = tokenizer_of_file(folder / "vocab.txt", 8, len(VOCABULARY))
    assert tokenize(ours, "a red apples, on a blue cafe").cut_text.strip() == "a blue cafe"
    assert len(tokenize(ours, "a red apples, on a blue cafe", chunked=True).chunks) == 2


def test_what_is_no_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="has neither"):
        bert_tokenizer(tmp_path, 77, 100)
    for content in ("{}", '{"model": {"vocab": {"a": -1}}}', '{"model": {"vocab": [1]}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(BadDataError):
            bert_tokenizer(tmp_path, 77, 100)
