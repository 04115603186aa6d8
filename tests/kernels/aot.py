"""Compiles whatever launches a function makes, for a GPU that is not there, and says what came out.

`compile_launches` runs the function with every launch intercepted: kernel, argument types and constants are
then exactly those of production, tile tables included.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

PROCESSORS = {80: 108, 89: 128, 90: 132, 100: 148, 120: 188}
_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
_OPTIONS = ("num_warps", "num_stages", "launch_pdl", "maxnreg")


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel's resources per thread and program, and how often instructions occur in its PTX."""

    kernel: str
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    ptx: str
    ttgir: str

    def summed(self) -> tuple[int, ...]:
        """How the dimension that is summed over is shared out, which is what the order of a sum depends on.

        The last one: its length, and in how many the elements of a thread, the lanes of a warp and the warps
        come.
        """
        found = re.search(r'"tt\.reduce"[\s\S]*?: \(tensor<\d+x(\d+)xf32, (#\w+)>\)', self.ttgir)
        assert found is not None, self.kernel
        length, name = found.groups()
        layout = re.search(rf"^{name} = #ttg\.blocked<.*$", self.ttgir, re.MULTILINE)
        assert layout is not None, name
        shares = re.findall(r"\w+(?:Thread|Warp|CTA) = \[\d+, (\d+)\]", layout[0])
        assert len(shares) == 3, layout[0]
        return int(length), *map(int, shares)

    def count(self, instruction: str) -> int:
        return len(re.findall(instruction, self.ptx))

    def count_early(self, instruction: str, waits: int = 1) -> int:
        """How often it comes before the first of so many waits for what was launched before."""
        early, *late = self.ptx.split("griddepcontrol.wait")
        assert len(late) == waits, self.kernel
        return len(re.findall(instruction, early))

    def __str__(self) -> str:
        counts = {
            name: self.count(pattern)
            for name, pattern in (
                ("wgmma", r"wgmma\.mma_async"),
                ("mma", r"mma\.sync"),
                ("bulk", r"cp\.async\.bulk\.tensor"),
                ("cp.async", r"cp\.async\.c[ag]"),
                ("v4", r"ld\.global[.\w:]*\.v4"),
            )
        }
        return (
            f"{self.kernel}: {self.registers} registers, stack {self.stack_bytes}, local {self.local_bytes}, "
            f"shared {self.shared_bytes}, {counts}"
        )


def compile_launches(function: Callable[[], Any], capability: int) -> list[Compiled]:
    """What the launches that `function` makes compile to, in order."""
    launches: list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((self, args, kwargs))

    def machine(_: torch.device) -> tuple[int, int]:
        return capability, PROCESSORS[capability]

    def dependent(pdl: bool, _: torch.device) -> bool:
        return pdl and capability >= 90

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(JITFunction, "run", record))
        for name, stand_in in (("machine", machine), ("dependent", dependent)):
            for module in _kernel_modules():
                if hasattr(module, name):
                    patches.enter_context(mock.patch.object(module, name, stand_in))
        function()
    return [_compile(*launch, capability) for launch in launches]


def _kernel_modules() -> list[Any]:
    import sys

    return [module for name, module in sys.modules.items() if name.startswith("baton_kernels.")]


def _compile(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any], capability: int) -> Compiled:
    options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
            continue
        signature[parameter.name] = _type(value)
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack, local = _resources(compiled.asm["cubin"])
    return Compiled(
        kernel=kernel.__name__,
        registers=registers,
        stack_bytes=stack,
        local_bytes=local,
        shared_bytes=compiled.metadata.shared,
        ptx=compiled.asm["ptx"],
        ttgir=compiled.asm["ttgir"],
    )


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype][1:]}{list(value.block_shape)}>"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
    assert isinstance(value, float)
    return "fp32"


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """(registers, stack bytes, local bytes) per thread, as the disassembler reads them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout)
    assert found is not None, done.stdout
    registers, stack, local = map(int, found.groups())
    return registers, stack, local
