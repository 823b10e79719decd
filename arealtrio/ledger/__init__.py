"""The ledger: a run that is killed loses no finished rollout, and trains none twice.

codec       prompts and groups as bytes
trouble     what SQLite reports, in words
lock        that it is of one process
file        the ledger on the disk, synchronous
writer      where its blocking calls run
entry       what a restart gets back
ledger      ``Ledger``: what is told to it, and when it is durable
"""

from .codec import decode_group, decode_prompt, encode_group, encode_prompt, mark_of
from .entry import Entry, Restored
from .ledger import Ledger, LedgerStatistics, open_ledger

__all__ = [
    "Entry",
    "Ledger",
    "LedgerStatistics",
    "Restored",
    "decode_group",
    "decode_prompt",
    "encode_group",
    "encode_prompt",
    "mark_of",
    "open_ledger",
]
