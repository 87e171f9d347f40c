"""Finance suites: the sentiment of news (FPB), of headlines and posts (FiQA) and of tweets (TFNS).

The hub's test parts are those of the leaderboard: for FPB and FiQA a quarter drawn with seed 42,
for TFNS the validation split.

Malo et al. 2014, "Good Debt or Bad Debt", arXiv:1307.5336 (FPB); Maia et al. 2018, "WWW'18 Open
Challenge: Financial Opinion Mining and Question Answering" (FiQA).
"""

from collections.abc import Callable

from silotune.data.conversations import Row
from silotune.workflows.evaluate.suites.base import Hub, Item, Layout, Suite
from silotune.workflows.evaluate.suites.cells import id_of, number_of, pick, text_of
from silotune.workflows.evaluate.suites.leaderboard import finance_prompt

SENTIMENTS = {label: label for label in ("negative", "neutral", "positive")}

FPB_LABELS = {0: "negative", 1: "neutral", 2: "positive"}
TFNS_LABELS = {0: "negative", 1: "positive", 2: "neutral"}
"""0 is bearish, 1 is bullish."""

Gold = Callable[[Row, str], str]


def _layout(text: str, label: str, gold: Gold) -> Layout:
    def read(row: Row, where: str) -> Item:
        said = text_of(row, text, where).strip()
        return Item(
            id=id_of(row, where),
            prompt="What is the sentiment of this text about finance?\n\n"
            f"{said}\n\nAnswer with negative, neutral or positive, nothing else.",
            options=SENTIMENTS,
            gold=gold(row, where),
            leaderboard=finance_prompt(said),
        )

    return Layout((text, label), read)


def fiqa_label(score: float) -> str:
    """The class of a FiQA score between -1 and 1."""
    return "negative" if score < -0.1 else "neutral" if score < 0.1 else "positive"


def _fiqa_gold(row: Row, where: str) -> str:
    return fiqa_label(number_of(row, "sentiment_score", where))


FPB = Suite(
    name="fpb",
    title="Financial PhraseBank: sentiment of news, three classes",
    hub=(Hub("takala/financial_phrasebank", "sentences_50agree", "train", exported=True),),
    layouts=(
        _layout("sentence", "label", lambda row, where: pick(FPB_LABELS, row, "label", where)),
    ),
    kind="sentiment",
    held_out=0.25,
)

FIQA = Suite(
    name="fiqa",
    title="FiQA: sentiment of financial headlines and posts, three classes",
    hub=(Hub("pauri32/fiqa-2018", None, "all"),),
    layouts=(_layout("sentence", "sentiment_score", _fiqa_gold),),
    kind="sentiment",
    held_out=0.25,
)

TFNS = Suite(
    name="tfns",
    title="Twitter financial news: sentiment of tweets, three classes",
    hub=(Hub("zeroshot/twitter-financial-news-sentiment", None, "validation"),),
    layouts=(_layout("text", "label", lambda row, where: pick(TFNS_LABELS, row, "label", where)),),
    kind="sentiment",
)
