"""Before stage 2: a small CLIP-style byte-pair vocabulary (Sennrich et al. 2016; Radford et al. 2021), learnt
from the captions.

The files are those of every CLIP tokenizer: 256 byte symbols, the same 256 closing a word, one symbol for
each merge, and the two special tokens. The captions hold so few words that merging runs until each of them
is a single token.

    python weights/recipe/tokenizer.py
"""

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import torch
from emoji import Captions
from presets import recipe_arguments
from training import known_emoji

from ldmcli.checkpoints.layout import WORD_LIST
from ldmcli.conditioning.chunks import tokenize
from ldmcli.conditioning.tokenizer import ClipTokenizer, vocabulary_from_folder

MAX_LENGTH = 24
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
_WORD = re.compile(r"[a-z]+|[^a-z\s]+")
Word = tuple[str, ...]


def byte_symbols() -> list[str]:
    """The printable stand-ins of all 256 bytes, in the order of CLIP's vocabulary (GPT-2's
    bytes_to_unicode)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def merge(word: Word, pair: tuple[str, str]) -> Word:
    """The word with every occurrence of the pair joined."""
    joined: list[str] = []
    for symbol in word:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return tuple(joined)


def learn_merges(words: Counter[str], limit: int) -> list[tuple[str, str]]:
    """Join the most frequent pair again and again, ties by spelling, until every word is whole or `limit`
    is reached."""
    split: dict[Word, int] = {(*word[:-1], word[-1] + END_OF_WORD): count for word, count in words.items()}
    merges: list[tuple[str, str]] = []
    while len(merges) < limit:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in split.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        split = {merge(word, best): count for word, count in split.items()}
    return merges


def write_tokenizer(folder: Path, merges: list[tuple[str, str]]) -> int:
    """Write vocab.json, merges.txt and the two configuration files; return the vocabulary's size."""
    symbols = byte_symbols()
    tokens = [*symbols, *(s + END_OF_WORD for s in symbols), *("".join(pair) for pair in merges), BEGIN, END]
    folder.mkdir(parents=True, exist_ok=True)

    def write(name: str, content: object) -> None:
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")

    write("vocab.json", {token: index for index, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END}
    write("special_tokens_map.json", special)
    write(
        "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": MAX_LENGTH,
            "do_lower_case": True,
            **special,
        },
    )
    return len(tokens)


def tokenise(folder: Path, texts: list[str]) -> torch.Tensor:
    """Token numbers (len(texts), MAX_LENGTH), as every CLIP pipeline makes them: lower-cased, BOS … EOS,
    then EOS up to the full length."""
    tokenizer = ClipTokenizer(vocabulary_from_folder(folder), MAX_LENGTH)
    return torch.tensor([tokenize(tokenizer, text).chunks[0].ids for text in texts])


def main() -> None:
    parser = recipe_arguments(__doc__)
    parser.add_argument("--merges", type=int, default=4000, help="at most so many merges")
    args = parser.parse_args()

    known = Captions(known_emoji(args))
    (args.out / WORD_LIST).write_text(known.word_list(), encoding="utf-8")
    captions = known.every()
    words = Counter(word for caption in captions for word in _WORD.findall(caption))
    size = write_tokenizer(args.out / "tokenizer", learn_merges(words, args.merges))
    longest = max(len(_WORD.findall(caption)) for caption in captions)
    print(f"{len(words)} words, vocabulary of {size}, longest caption {longest} + 2 tokens -> {args.out / 'tokenizer'}")


if __name__ == "__main__":
    main()
