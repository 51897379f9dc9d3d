"""GELU in a compiled block: torch's own, to the bit, and really by torch's own kernel."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from gpt.gelu import _gelu, _gelu_backward, gelu


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_is_torchs_own(approximate: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    values = torch.randn(3, 5, 64).mul_(3).to(dtype)
    grad = torch.randn_like(values)
    backend = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(gelu, backend=backend, fullgraph=True)
    made = []
    for function in (compiled, lambda x, how: F.gelu(x, approximate=how)):
        x = values.clone().requires_grad_()
        y = function(x, approximate)
        y.backward(grad)
        made.append((y.detach(), x.grad))
    assert torch.equal(made[0][0], made[1][0])
    assert torch.equal(made[0][1], made[1][1])
    own = any("gpt.gelu" in str(node.target) for node in backend.graphs[0].graph.nodes)
    assert own == (dtype == torch.bfloat16)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_compiler_is_told_the_truth(approximate: str) -> None:
    x = torch.randn(4, 6, dtype=torch.bfloat16)
    torch.library.opcheck(_gelu, (x.clone().requires_grad_(), approximate))
    torch.library.opcheck(_gelu_backward, (x, x, approximate))
