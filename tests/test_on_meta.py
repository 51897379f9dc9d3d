"""Models without numbers: the same parameters, nothing drawn, no compiler imported."""

import subprocess
import sys

import torch

from gpt.config import ModelConfig
from gpt.device import on_meta
from gpt.model import GPT

SHAPES = [
    {},
    {"position": "learned", "tie_embeddings": True, "norm": "layernorm", "bias": True},
    {"ngram": 3, "activation": "swiglu"},
]


def test_a_model_on_meta_becomes_the_one_whose_weights_it_is_given() -> None:
    for shape in SHAPES:
        config = ModelConfig.model_validate({"n_embd": 32, "context_len": 16, **shape})
        torch.manual_seed(3)
        drawn = GPT(config, 50)
        state = torch.get_rng_state()
        with on_meta():
            model = GPT(config, 50)
        assert all(one.is_meta for one in (*model.parameters(), *model.buffers()))
        assert torch.equal(torch.get_rng_state(), state)
        model.allocate()
        assert (model.head.weight is model.tok_emb.weight) == config.tie_embeddings
        model.load_state_dict(drawn.state_dict())
        ids = torch.arange(16)[None]
        assert torch.equal(model(ids), drawn(ids))


def test_building_one_imports_no_compiler() -> None:
    code = (
        "import sys; from gpt.config import ModelConfig; from gpt.device import on_meta\n"
        "from gpt.model import GPT\n"
        "with on_meta(): GPT(ModelConfig(), 50)\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
