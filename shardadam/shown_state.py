"""``optimizer.state``: dicts that show views of the buckets, and note what users write into them.

[Note: state by hand]

The update works on buckets; ``optimizer.state`` only shows views of them. torch's optimizers read
that dict at every step, so code written for them clears it, deletes entries, puts tensors in. These
dicts note that they were written to, which costs a step nothing. Before the state is next used,
what was put there is copied into the buckets, and views of those are shown again: it has had the
effect that it has in torch. What does not fit is an error, and nothing is copied.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from shardadam.buffers import FlatBucket
from shardadam.kernels.state_formats import FORMATS, MASTERS

_WRITES = (
    *("__setitem__", "__delitem__", "__ior__"),
    *("clear", "pop", "popitem", "setdefault", "update"),
)

# What an entry may hold of ours, but for the order of dims in a name: the rest is somebody else's.
_OURS = frozenset(
    ["step", "mu_product", *MASTERS]
    + [name for form in FORMATS.values() for name in form.tensors(True).values()]
)


def is_ours(name: Any) -> bool:
    """Whether ``name`` is that of a scalar or tensor of ours."""
    return isinstance(name, str) and name.partition("@")[0] in _OURS


class _Notes:
    """Whether a state or one of its entries was written to."""

    def __init__(self) -> None:
        self.written = False


class Entry(dict[str, Any]):
    """One param's: views, and what others keep beside them."""

    def __init__(self, notes: _Notes, others: Mapping[str, Any]) -> None:
        super().__init__(others)
        self.notes = notes

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (), None, None, iter(self.items())  # a copy is nobody's state


class ShownState(defaultdict[Any, Any]):
    """Every param's `Entry`, and what others keep beside them. ``views``: what they show."""

    def __init__(self, params: Iterable[Tensor] = ()) -> None:
        super().__init__(dict)
        self.notes = _Notes()
        self.views: dict[Tensor, dict[str, Tensor]] = {}
        self.add(params)

    def add(self, params: Iterable[Tensor], state: Mapping[Any, Any] | None = None) -> None:
        """Make the entries of ``params`` where there are none, in this order.

        ``state``: what others keep, besides or in the entries.
        """
        state = {} if state is None else dict(state)
        for param in params:
            others = state.pop(param, None)
            entry = self.get(param)
            if not isinstance(entry, Entry) or entry.notes is not self.notes:
                defaultdict.__setitem__(self, param, Entry(self.notes, entry or {}))
            dict.update(self[param], others or {})
        dict.update(self, state)

    def show(self, bucket: FlatBucket) -> None:
        """Show the state of ``bucket``, whose params have entries.

        What else is ours by its name was put there in another format, and has been taken.
        """
        for index, param in enumerate(bucket.params):
            self.views[param] = bucket.state_of(index)
            for name in [name for name in self[param] if is_ours(name)]:
                if name not in self.views[param]:
                    dict.__delitem__(self[param], name)
            dict.update(self[param], self.views[param])

    def __reduce__(self) -> tuple[Any, ...]:
        return defaultdict, (dict,), None, None, iter(self.items())


def plain(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """A copy whose dicts note nothing."""
    return {key: dict(e) if isinstance(e, Entry) else e for key, e in state.items()}


def _noting(method: Any) -> Any:
    def write(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.notes.written = True
        return method(self, *args, **kwargs)

    return write


for _class in (Entry, ShownState):
    for _name in _WRITES:
        setattr(_class, _name, _noting(getattr(_class, _name)))
