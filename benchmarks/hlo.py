"""Compiled HLO as `stages.py` needs it: where every kernel belongs, what it moves and works."""

import math
import re
from collections import defaultdict
from typing import NamedTuple

STAGES = "forecast", "replicas", "sorted", "start", "exchanges", "separate", "maps"
FREE = {
    "parameter",
    "constant",
    "bitcast",
    "broadcast",
    "iota",
    "tuple",
    "get-tuple-element",
    "copy",
}
FREE |= {"reshape", "transpose", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate"}
FREE |= {"gather", "pad"}
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}


class Op(NamedTuple):
    """An instruction of compiled HLO."""

    computation: str
    kind: str
    type: str
    operands: list[str]
    attributes: str


class Kernels(NamedTuple):
    """The instructions of a compiled function: where they belong and what they must do."""

    ops: dict[str, Op]
    inside: dict[str, list[str]]
    callers: dict[str, str]

    def stage(self, name: str) -> str:
        """The outermost stage, or that of the loop around it where XLA made it up."""
        scope = re.search(r'op_name="([^"]*)"', self.ops[name].attributes)
        for word in re.split(r"[/()]+", scope[1]) if scope else ():
            if word in STAGES:
                return word
        caller = self.callers.get(self.ops[name].computation)
        return self.stage(caller) if caller else "other"

    def operations(self, name: str) -> float:
        """One a number that an instruction of it makes or reduces; more by a logarithm in sorts."""
        op = self.ops[name]
        if op.kind == "fusion":
            return sum(self.operations(x) for x in self.inside[self.called(name)])
        if op.kind in FREE:
            return 0
        count = elements(op.type)
        if op.kind.startswith(("reduce", "scatter")):
            count = max([count, *(elements(self.ops[x].type) for x in op.operands[:1])])
        if op.kind == "sort":
            shape, axis = re.search(r"\[(.+?)\]", op.type), re.search(r"ns={(\d+)}", op.attributes)
            length = int(shape[1].split(",")[int(axis[1])]) if shape and axis else 2
            count *= math.log2(max(length, 2))
        return count

    def bytes(self, name: str) -> float:
        """What the kernel reads and writes."""
        op = self.ops[name]
        if op.kind != "fusion":
            return self.written(name) + sum(self.read(name, x) for x in op.operands)
        body = self.inside[self.called(name)]
        read = 0.0
        for parameter in (x for x in body if self.ops[x].kind == "parameter"):
            whole = size(self.ops[parameter].type)
            users = self.users(parameter, body)
            read += min(whole, sum(self.read(user, x) for user, x in users))
        return read + self.written(body[-1])

    def users(self, name: str, body: list[str]) -> list[tuple[str, str]]:
        """Who takes it, bitcasts aside, and under which name."""
        found = []
        for user in (x for x in body if name in self.ops[x].operands):
            seen = self.ops[user].kind == "bitcast"
            found += self.users(user, body) if seen else [(user, name)]
        return found

    def read(self, user: str, operand: str) -> float:
        """Bytes of one operand that an instruction looks at."""
        op = self.ops[user]
        sliced = op.operands[:1] == [operand]
        if sliced and op.kind in ("slice", "dynamic-slice", "gather"):
            return size(op.type)
        if sliced and op.kind in ("dynamic-update-slice", "scatter"):
            return 0
        return size(self.ops[operand].type)

    def written(self, name: str) -> float:
        """Bytes of its result, or of what it changes in place."""
        op = self.ops[name]
        if op.kind in ("tuple", "bitcast"):
            return sum(self.written(x) for x in op.operands)
        changed = {"dynamic-update-slice": 1, "scatter": 2}.get(op.kind)
        return size(op.type if changed is None else self.ops[op.operands[changed]].type)

    def called(self, name: str) -> str:
        """The computation of a fusion."""
        return re.findall(r"calls=%([\w.\-]+)", self.ops[name].attributes)[0]


def elements(kind: str) -> int:
    return sum(
        math.prod(map(int, filter(None, x.split(",")))) for x in re.findall(r"\[(.*?)\]", kind)
    )


def size(kind: str) -> int:
    return sum(BYTES.get(x, 4) * elements(f"[{y}]") for x, y in re.findall(r"(\w+)\[(.*?)\]", kind))


def parsed(text: str) -> Kernels:
    ops, inside, callers, computation = {}, defaultdict(list), {}, ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%([\w.\-]+) .*\{$", line):
            computation = head[1]
        match = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(.*)", line)
        if match:
            name, kind, opcode, operands, attributes = match.groups()
            ops[name] = Op(
                computation, opcode, kind, re.findall(r"%([\w.\-]+)", operands), attributes
            )
            inside[computation].append(name)
            for called in re.findall(r"(?:body|condition|calls|to_apply)=%([\w.\-]+)", attributes):
                callers[called] = name
    return Kernels(ops, inside, callers)
