"""SentencePiece models as they are trained by default: they normalise, and put a space before a text."""

import numpy as np
import sentencepiece

LETTERS = "abcdefghijklmnopqrstuvwxyz.:?-"


def train_lossy_model(path, more: str = "", vocab_size: int = 120) -> None:
    """Trains a model on words of `LETTERS` and `more`; all else is unknown to it."""
    random = np.random.default_rng(0)
    characters = list(LETTERS + more)
    words = ["".join(random.choice(characters, 4)) for _ in range(300)] + [LETTERS + more] * 3
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(" ".join(words[i : i + 8]) for i in range(0, len(words), 8)),
            model_writer=file,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            unk_id=0,
            bos_id=1,
            eos_id=-1,
            minloglevel=2,
            num_threads=1,
        )
