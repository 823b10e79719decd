from collections.abc import Iterable
from typing import Self, final

@final
class Filler:
    def __new__(cls, kind: type, names: Iterable[str]) -> Self: ...
    def __call__(self, record: object, values: tuple[object, ...]) -> None: ...
