"""`eplb-jax moves`: what leads from one plan to another."""

from typing import Annotated

import numpy as np
from rich.console import Console
from rich.table import Table
from typer import Argument, Option, echo

from eplb_jax.cli import inputs
from eplb_jax.cli.arguments import Json, MaybeGpus, Nodes, active_gpus
from eplb_jax.cli.files import STDOUT, check_writable, write_json
from eplb_jax.transition.moves import STAYS, Moves
from eplb_jax.transition.moves import moves as moves_of

REACH = ("stays", "same GPU", "same node", "other node", "storage")
"""What every reach is called."""

Old = Annotated[str, Argument(metavar="OLD", help="Plan in place: a file of a known format.")]
New = Annotated[str, Argument(metavar="NEW", help="Plan to come: a file of a known format.")]
BytesPerExpert = Annotated[
    int | None, Option(help="Size of the parameters of one expert of one layer.")
]


def moves(
    old: Old,
    new: New,
    num_gpus: MaybeGpus = None,
    num_nodes: Nodes = 1,
    active: Annotated[
        str | None, Option(metavar="GPUS", help="GPUs that are alive, such as 0-5,7; default: all.")
    ] = None,
    bytes_per_expert: BytesPerExpert = None,
    listed: Annotated[bool, Option("--list", help="Print every move.")] = False,
    json_file: Json = None,
) -> None:
    """List what leads from one plan to another: by GPU and node, in bytes, move by move."""
    check_writable(json_file, (old, new))
    before, after, numbers = inputs.two_plans(old, new, num_gpus, num_nodes)
    topology = inputs.topology_of(after)
    transfers = moves_of(
        before.phy2log, after.phy2log, topology, active=active_gpus(active, topology.num_gpus)
    )
    console = Console(highlight=False, stderr=json_file == STDOUT)
    console.print(f"{len(numbers)} layers x {topology.num_replicas} slots: {moved(transfers)}")
    size = 1 if bytes_per_expert is None else bytes_per_expert
    unit = "slots" if bytes_per_expert is None else "bytes"
    by_layer = transfers.traffic(size)
    sent, received = by_layer.sent.sum(axis=0), by_layer.received.sum(axis=0)
    table = Table("node", "GPU", title=f"{unit}, over all layers", title_justify="left")
    for header in ("sends", "receives"):
        table.add_column(header, justify="right")
    for gpu, node in enumerate(topology.node_of_gpu):
        table.add_row(str(node), str(gpu), f"{sent[gpu]:,}", f"{received[gpu]:,}")
    console.print(table)
    rows = transfer_list(transfers, after.phy2log, numbers)
    if listed:
        echo("layer,slot,expert,from_slot,reach", err=json_file == STDOUT)
        for layer, slot, expert, source, reach in rows:
            echo(f"{layer},{slot},{expert},{source},{reach}", err=json_file == STDOUT)
    keys = ("layer", "slot", "expert", "from_slot", "reach")
    write_json(
        json_file,
        {
            "layers": numbers,
            "reaches": REACH,
            "copies": transfers.copies,
            "bytes_per_expert": bytes_per_expert,
            f"sent_{unit}": sent,
            f"received_{unit}": received,
            "moves": [dict(zip(keys, row, strict=True)) for row in rows],
        },
    )


def moved(transfers: Moves) -> str:
    """How many slots take their expert from where, in one line."""
    copies = np.asarray(transfers.copies).sum(axis=0)
    total = copies.sum()
    changed = [f"{n:,} from {REACH[i]}" for i, n in enumerate(copies) if n and i != STAYS]
    share = 1 - copies[STAYS] / total
    return f"{share:.1%} of {total:,} slots change" + (": " if changed else "") + ", ".join(changed)


def transfer_list(
    transfers: Moves, phy2log: np.ndarray, layers: tuple[int, ...]
) -> list[tuple[int, int, int, int, str]]:
    """Layer, slot, expert, source slot (-1 for storage) and reach of every slot that changes."""
    reach, source = np.asarray(transfers.reach), np.asarray(transfers.source)
    where = np.argwhere(reach != STAYS)
    return [
        (layers[i], int(j), int(phy2log[i, j]), int(source[i, j]), REACH[reach[i, j]])
        for i, j in where
    ]
