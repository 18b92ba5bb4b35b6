"""Requests are answered as if each were read alone, whatever is read beside it.

The reader is that of a tiny model with fast weights; a mini-batch has 8 tokens. Tolerances: float32, sums of up to 40
tokens, whose programs differ by the number of sequences that they are for.
"""

import numpy as np
import pytest

from tests.evaluation.conftest import BOS, b
from ttt_e2e.data.tokenizers import ByteTokenizer
from ttt_e2e.evaluation.answers import Answers, Manner, Prompt, Text, batches, equal_batches, filled
from ttt_e2e.evaluation.subject import Subject
from ttt_e2e.inference.settings import Sampling

GREEDY = Manner(12, (), Sampling(temperature=0.0))
CLOSE = {"rel": 1e-4, "abs": 1e-4}


@pytest.fixture(scope="module")
def reader(config, workdir):
    return Subject(config, workdir).reader(0)


def answers_of(reader, learn=True) -> Answers:
    return Answers(reader, ByteTokenizer(), BOS, learn)


def some_text(number: int, length: int, num_scored: int) -> Text:
    tokens = np.random.default_rng(number).integers(97, 105, length).astype(np.int32)
    return Text(np.array([BOS, *tokens], np.int32), num_scored)


# Shorter than a mini-batch, as long, longer; scored in one mini-batch, over two, and whole.
TEXTS = [some_text(i, *sizes) for i, sizes in enumerate([(5, 2), (b, 3), (b + 1, 1), (2 * b + 3, 6), (3 * b, 3 * b)])]


def decoded(reader, text: Text, learn=True):
    """What decoding the text token by token gives: the log-likelihood, and whether a greedy decoder says the same."""
    state, nlls, likeliest = reader.start(BOS), [], []
    for token in text.tokens[1:]:

        def choose(logits_BV, token=token):
            likeliest.append(int(logits_BV.argmax()) == token)
            return np.array([token])

        state, _, [nll] = reader.step(state, choose, learn=learn)
        nlls.append(float(nll))
    return -sum(nlls[-text.num_scored :]), all(likeliest[-text.num_scored :])


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_scores_are_those_of_decoding_alone(reader, learn, batch_size):
    answers = answers_of(reader, learn)
    found = {}
    for batch in batches([len(text.tokens) for text in TEXTS], batch_size):
        found |= zip(batch, answers.score([TEXTS[i] for i in filled(batch, batch_size)], greedy=True))
    for i, text in enumerate(TEXTS):
        loglikelihood, is_greedy = decoded(reader, text, learn)
        assert found[i]["loglikelihood"] == pytest.approx(loglikelihood, **CLOSE)
        assert found[i]["is_greedy"] == is_greedy
    assert [found[i]["inner_steps"] for i in range(5)] == ([0, 0, 1, 2, 2] if learn else [0] * 5)


def test_without_greedy_the_scores_are_the_same(reader):
    both = [answers_of(reader).score(TEXTS, greedy=greedy) for greedy in (True, False)]
    for with_greedy, without in zip(*both):
        assert without["loglikelihood"] == pytest.approx(with_greedy["loglikelihood"], **CLOSE)
        assert "is_greedy" not in without


def test_learning_is_seen_where_there_is_an_inner_step_and_nowhere_else(reader):
    """The control of the tests above: one that never learns, or always, would fail them."""
    learned, not_learned = (answers_of(reader, learn).score(TEXTS, greedy=False) for learn in (True, False))
    for with_learning, without in zip(learned, not_learned):
        difference = abs(with_learning["loglikelihood"] - without["loglikelihood"])
        assert difference > 1e-2 if with_learning["inner_steps"] else difference < 1e-4


def greedy_alone(reader, tokens, count: int):
    state, _ = reader.read(reader.start(tokens[0]), tokens[None, 1:])
    said = []
    for _ in range(count):
        state, [token], _ = reader.step(state, lambda logits_BV: logits_BV.argmax(-1))
        said.append(int(token))
    return said


def test_a_greedy_text_is_greedy_and_another_is_not(reader):
    prompt = some_text(0, b - 2, 0).tokens
    said = greedy_alone(reader, prompt, 5)
    other = [*said[:2], (said[2] + 1) % 256, *greedy_alone(reader, prompt, 2)]
    texts = [Text(np.array([*prompt, *ids], np.int32), 5) for ids in (said, other)]
    assert [answer["is_greedy"] for answer in answers_of(reader).score(texts, greedy=True)] == [True, False]


def test_prompts_are_continued_as_alone_in_any_batch(reader):
    prompts = [Prompt(some_text(i, b + 3, 0).tokens, i) for i in range(5)]
    answers = answers_of(reader)
    expected = [ByteTokenizer().decode(greedy_alone(reader, prompt.tokens, 12)) for prompt in prompts]
    for batch_size in (1, 4):
        for batch in equal_batches([len(prompt.tokens) for prompt in prompts], batch_size):
            found = answers.continue_([prompts[i] for i in filled(batch, batch_size)], GREEDY)
            for i, answer in zip(batch, found):
                assert answer == {"text": expected[i], "inner_steps": (b + 3 + 12 - 1) // b}


def test_what_is_drawn_depends_on_the_number_alone(reader):
    manner, tokens = Manner(6, (), Sampling(temperature=1.0)), some_text(0, 3, 0).tokens
    prompts, answers = [Prompt(tokens, i) for i in range(4)], answers_of(reader)
    together = [answer["text"] for answer in answers.continue_(prompts, manner)]
    assert [answers.continue_([prompt], manner)[0]["text"] for prompt in prompts] == together
    assert len(set(together)) == 4


def test_a_stop_ends_a_text_and_leaves_the_others(reader):
    prompts, answers = [Prompt(some_text(i, 4, 0).tokens, i) for i in range(2)], answers_of(reader)
    whole = [answer["text"] for answer in answers.continue_(prompts, GREEDY)]
    stop = whole[0][3:5]
    stopped = answers.continue_(prompts, GREEDY._replace(stops=(stop, "never")))
    assert [answer["text"] for answer in stopped] == [text.split(stop)[0] for text in whole]
    assert stopped[0]["text"] != whole[0]


def test_batches_have_every_request_once():
    lengths = [3, 9, 1, 9, 5, 3]
    assert batches(lengths, 4) == [[1, 3, 4, 0], [5, 2]]
    assert equal_batches(lengths, 1 + 1) == [[0, 5], [1, 3], [2], [4]]
    assert [filled([7] * n, 6) for n in (1, 2, 3, 5)] == [[7], [7] * 2, [7] * 4, [7] * 6]
