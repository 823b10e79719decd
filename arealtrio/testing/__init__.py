"""Test what uses arealtrio without a GPU, a socket or a second of real time.

``simulated_executor`` opens the production executor over servers that live in memory on trio's
clock. They are the embedded server's own state machine and speak vLLM's dialect by its own code;
only the tokens are made up, so that a test can check each of them. See ``script`` for how.

lengths     how long answers are
script      what answers are: ``ScriptedModel``, ``checkpoint``, ``made_by``
clockwork   the scheduler in continuous time
alarm       wakes one task at an hour that others may move
timetable   one alarm for all of a fleet
patience    ends the waits of clients whose time is up
settings    ``SimulatedServerSettings``
faces       both dialects, in memory
asgi        asks their handlers
server      ``SimulatedServer``
stream      an answer that arrives as it is made
amounts     numbers above 0, or at least 0
fault       ``FaultKind``: what can go wrong; ``Fault``: what did
planned     a fault that a test asks for
faults      ``Faults``: by chance, by plan or by hand
mishap      what becomes of one answer
fleet       ``SimulatedFleet``, the transport
run         ``simulated_executor``
repeatable  ``run_virtually``, ``repeatable_schedule``

``arealtrio.testing.pytest_plugin`` holds fixtures for pytest; nothing here imports it.
"""

from .fault import Fault, FaultKind
from .faults import Faults
from .fleet import Exchange, SimulatedFleet, open_fleet
from .lengths import FixedLengths, Lengths, LogNormalLengths, RecordedLengths
from .repeatable import repeatable_schedule, run_virtually
from .run import simulated_executor
from .script import EOS, TORN, ScriptedModel, checkpoint, made_by
from .server import ServerCondition, SimulatedServer
from .settings import SimulatedServerSettings

__all__ = [
    "EOS",
    "TORN",
    "Exchange",
    "Fault",
    "FaultKind",
    "Faults",
    "FixedLengths",
    "Lengths",
    "LogNormalLengths",
    "RecordedLengths",
    "ScriptedModel",
    "ServerCondition",
    "SimulatedFleet",
    "SimulatedServer",
    "SimulatedServerSettings",
    "checkpoint",
    "made_by",
    "open_fleet",
    "repeatable_schedule",
    "run_virtually",
    "simulated_executor",
]
