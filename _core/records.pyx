"""All slots of a new record in one call.

A frozen dataclass refuses assignments, so the ``__init__`` that Python writes for it goes through
``object.__setattr__`` for each field, and looks for the name in the class each time. Of records
that every rollout makes that is most of what they cost.
"""

cimport cython
from cpython.object cimport Py_TYPE
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_GET_SIZE
from types import MemberDescriptorType


@cython.final
cdef class Filler:
    """Fills the slots of a class's instances, whether or not the class is frozen.

    It is for code of the class itself: nothing is checked, and nobody else is to change a record.

    Args:
        kind: A class with slots.
        names: Of slots of its own, in the order in which values are given.

    Raises:
        TypeError: If one of them is no slot of the class.
    """

    cdef tuple slots

    def __cinit__(self, type kind not None, names):
        slots = [vars(kind).get(name) for name in names]
        for name, slot in zip(names, slots):
            if type(slot) is not MemberDescriptorType:
                raise TypeError(f"{kind.__name__}.{name} is no slot")
        self.slots = tuple(slots)

    def __call__(self, record, tuple values not None):
        """Set each slot to its value.

        Args:
            record: An instance of the class.
            values: One for each name.

        Raises:
            TypeError: If it is no instance.
            ValueError: If there are more or fewer values than slots; nothing is set.
        """
        cdef Py_ssize_t i, size = PyTuple_GET_SIZE(self.slots)
        cdef object slot
        if PyTuple_GET_SIZE(values) != size:
            raise ValueError(f"{size} slots need as many values, not {len(values)}")
        for i in range(size):
            slot = <object> PyTuple_GET_ITEM(self.slots, i)
            Py_TYPE(slot).tp_descr_set(slot, record, <object> PyTuple_GET_ITEM(values, i))
