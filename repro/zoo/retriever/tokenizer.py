"""Build the tokenizer of the retriever: whole words, syllables, digit pairs, bytes for the rest."""

from __future__ import annotations

import re
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from repro.measurements.ruler import lexicon
from repro.measurements.ruler.tasks import TASKS, Draw, ask
from repro.zoo.retriever import skills

PAD, END = "<pad>", "<end>"
_HEX = [f"{value:02x}" for value in range(256)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer; the same sources always give the same ids.

    A word is one token with the space before it; a made-up word is two syllables; numbers and codes
    are cut in pairs of characters; any other text falls back to bytes, so every text round-trips.
    """
    words = _words()
    pieces = [f" {word}" for word in words] + [w for w in words if not w.islower()]
    pieces += [f" {s}" for s in lexicon.FIRST_SYLLABLES] + list(lexicon.LAST_SYLLABLES)
    pieces += [f" {pair}" for pair in _HEX] + _HEX + [f" {digit}" for digit in range(10)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoded = [level.pre_tokenize_str(piece)[0][0] for piece in pieces]
    vocabulary = {t: i for i, t in enumerate(dict.fromkeys([PAD, END, *alphabet, *encoded]))}
    # With no merges and `ignore_merges`, a piece is looked up whole and falls back to its bytes.
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], ignore_merges=True))
    alternatives = "|".join(re.escape(w) for w in sorted(words, key=len, reverse=True))
    rules = [
        r" ?[0-9a-f]{2}(?=[0-9a-f]*(?![0-9A-Za-z]))",
        rf" ?(?:{alternatives})(?![A-Za-z])",
        r" ?[a-z]{3}",
        r" ?[\s\S]",
    ]
    pattern = Regex("|".join(rules))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(PAD, special=True), AddedToken(END, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
    )


def save_tokenizer(folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``."""
    build_tokenizer().save_pretrained(folder)


def _words() -> list[str]:
    """Return the words of all prompts and of the prose, without made-up words and codes."""
    texts = list(lexicon.REPEATED)
    for task in TASKS.values():
        problem = task.build(Draw("vocabulary", "train", 70, 4096, 0.5))
        texts += [problem.intro, *(ask(q) + q.completion for q in problem.queries)]
    texts += skills.TEMPLATES
    found = set(re.findall(r"[A-Za-z]{2,}|[aA]", " ".join(texts))) | lexicon.RESERVED
    found |= {
        "The",
        "A",
        "We",
        "When",
        "It",
        "Document",
        "List",
        "Text",
        "walk",
        "the",
        "a",
        "is",
        "and",
    }
    firsts, lasts = set(lexicon.FIRST_SYLLABLES), set(lexicon.LAST_SYLLABLES)
    made_up = {w for w in found - lexicon.RESERVED if w[:3] in firsts and w[3:] in lasts}
    codes = {w for w in found if re.fullmatch(r"[0-9a-f]{2,}", w)}
    return [*sorted(found - made_up - codes), "...", ".", ",", ":", "?"]
