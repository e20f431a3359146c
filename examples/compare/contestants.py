"""The ten optimizers, who proposed them, and what they look like in every figure."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torch.optim import SGD, Adadelta, Adagrad, Optimizer, RMSprop

import shardadam
from compare.style import BLACK, BLUE, GRAY, GREEN, ORANGE, PURPLE, SKY, VERMILLION

LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""What every optimizer is tuned over; all else is its own default."""


@dataclass(frozen=True)
class Contestant:
    """``make(params, lr=…)`` makes it; ``default_lr`` is what it takes if not told."""

    name: str
    paper: str
    make: Callable[..., Optimizer]
    default_lr: float
    color: str
    dashes: str | tuple[int, tuple[int, ...]] = "-"

    def __call__(self, params: Iterable[Tensor], lr: float) -> Optimizer:
        return self.make(params, lr=lr)


# Relatives share a colour and differ in their dashes.
_SHORT, _DOTS, _BOTH = (0, (4, 2)), (0, (1, 1)), (0, (5, 1, 1, 1))

CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant("SGD", "Robbins & Monro 1951", SGD, 1e-3, GRAY),
        Contestant("Momentum", "Polyak 1964", partial(SGD, momentum=0.9), 1e-3, BLACK),
        Contestant(
            *("NAG", "Nesterov 1983", partial(SGD, momentum=0.9, nesterov=True), 1e-3),
            *(BLACK, _SHORT),
        ),
        Contestant("AdaGrad", "Duchi et al. 2011", Adagrad, 1e-2, GREEN),
        Contestant("RMSprop", "Tieleman & Hinton 2012", RMSprop, 1e-2, ORANGE, _BOTH),
        Contestant("AdaDelta", "Zeiler 2012", Adadelta, 1.0, PURPLE),
        Contestant("Adam", "Kingma & Ba 2015", shardadam.Adam, 1e-3, BLUE),
        Contestant(
            *("AMSGrad", "Reddi et al. 2018", partial(shardadam.Adam, amsgrad=True), 1e-3),
            *(SKY, _SHORT),
        ),
        Contestant("NAdam", "Dozat 2016", shardadam.NAdam, 2e-3, VERMILLION, _SHORT),
        Contestant("AdamW", "Loshchilov & Hutter 2019", shardadam.AdamW, 1e-3, BLUE, _DOTS),
    )
}
