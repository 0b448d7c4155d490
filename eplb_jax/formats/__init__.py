"""Files of engines in and out: loads [T, L, E] from recordings, plans from and to maps.

`read` gives the loads of a recording, `read_plan` the map in a file, `write_plan` the bytes of a
map in an engine's own format. Formats are recognised by content; `FORMATS` has them all.
"""

from eplb_jax.formats.registry import FORMATS as FORMATS
from eplb_jax.formats.registry import map_in_place as map_in_place
from eplb_jax.formats.registry import read as read
from eplb_jax.formats.registry import read_plan as read_plan
from eplb_jax.formats.registry import write_plan as write_plan
from eplb_jax.formats.types import Format as Format
from eplb_jax.formats.types import PlanFile as PlanFile
from eplb_jax.formats.types import Recording as Recording
from eplb_jax.formats.vllm import LogLines as LogLines
from eplb_jax.formats.vllm import read_log as read_log
