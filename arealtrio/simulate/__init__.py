"""Plan a fleet and a staleness bound before there are GPUs: whole training runs on virtual time.

The production executor, engine and codecs run over ``arealtrio.testing``'s servers on trio's
``MockClock``; only lengths of answers, decoding speed and training time are given. What comes out
is what the same settings would do with real servers of that speed.

servers     what the servers are, and how a fleet is written
answers     how long answers are
plan        ``Plan``: everything that is given
occupancy   how many slots generate, over time
run         ``simulate``: one run of a plan
outcome     ``Outcome``: what came of it
report      the same as lines for a terminal, and as JSON
bars        of those lines
figure      and as a picture; the one module that needs matplotlib
comparison  several settings, one after another
progress    a line on the terminal meanwhile
options     what options take, and the values of a sweep
command     ``arealtrio simulate``
"""

from .answers import Answers, FixedAnswers, LogNormalAnswers, RecordedAnswers
from .outcome import Outcome
from .plan import Plan
from .run import simulate
from .servers import ServerKind, fleet

__all__ = [
    "Answers",
    "FixedAnswers",
    "LogNormalAnswers",
    "Outcome",
    "Plan",
    "RecordedAnswers",
    "ServerKind",
    "fleet",
    "simulate",
]
