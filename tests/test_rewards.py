"""The verifier pays +1 for the label and −1 for everything else."""

from hypothesis import given
from hypothesis import strategies as st

from sftrl_utils.corpora import ANSWERS
from sftrl_utils.rewards import verifier

TEXTS = st.one_of(st.sampled_from(ANSWERS), st.text(max_size=12))


@given(st.lists(st.tuples(TEXTS, st.integers(0, 1)), min_size=1, max_size=8))
def test_reward_is_plus_one_exactly_for_the_label_s_word(pairs):
    texts, labels = zip(*pairs, strict=True)
    rewards = verifier("label")(completions=list(texts), label=list(labels), prompts=[""] * len(texts))
    assert rewards == [1.0 if text == ANSWERS[gold] else -1.0 for text, gold in pairs]


def test_a_rationale_is_paid_for_its_answer_alone():
    reward = verifier("rationale")
    texts = ["acceptable: whatever", "unacceptable: whatever", "acceptable", "whatever"]
    assert reward(completions=texts, label=[1, 1, 1, 1]) == [1.0, -1.0, -1.0, -1.0]
