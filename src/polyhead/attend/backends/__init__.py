"""One file a backend; `BACKENDS` has them in the planner's order, fastest first."""

from polyhead.attend.backends.banded import Banded
from polyhead.attend.backends.by_head import ByHead
from polyhead.attend.backends.chosen import ChosenBlocks
from polyhead.attend.backends.flex import Flex
from polyhead.attend.backends.grouped import Grouped
from polyhead.attend.backends.neighborhood import Neighborhoods
from polyhead.attend.backends.reference import Reference
from polyhead.attend.backends.sdpa import Sdpa
from polyhead.attend.backends.seen_blocks import SeenBlocks
from polyhead.attend.backends.signs import Signs
from polyhead.attend.backends.staircase import Staircase
from polyhead.attend.backends.tiles import Tiles
from polyhead.attend.backends.triton_heads import TritonHeads
from polyhead.attend.plan import Backend

__all__ = ["BACKENDS", "STREAMING"]

# those with a forward and a backward of their own: one step of a graph each
STREAMING: tuple[Backend, ...] = (Banded(), Neighborhoods(), TritonHeads(), Tiles())
_GENERAL: tuple[Backend, ...] = (Sdpa(), Staircase(), *STREAMING, Flex(), Signs(), Reference())
_CHOSEN = ChosenBlocks(_GENERAL)
# what a call of some heads goes to: the blocks of a mask pay where few heads share it
_SOME_HEADS: tuple[Backend, ...] = (Sdpa(), _CHOSEN, Grouped(), Banded(), SeenBlocks(_CHOSEN), *_GENERAL[1:])
BACKENDS: tuple[Backend, ...] = (Sdpa(), _CHOSEN, ByHead(_SOME_HEADS), Grouped(), *_GENERAL[1:])
