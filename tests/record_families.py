"""Record what transformers (torch, float32, CPU, eager attention) says of tests/families.py:

    python -m venv V && V/bin/pip install torch transformers && PYTHONPATH=tests V/bin/python tests/record_families.py

Run once; the suite itself needs neither. Written are logits [40, V] of each prompt, or, of embedders, the hidden state
of its last token after the final norm, and the versions.
"""

import copy

import numpy as np
import torch
import transformers
from families import CASES, EMBEDDERS, RECORDED, prompt_of, weights


def record(name: str) -> np.ndarray:
    given = copy.deepcopy(CASES[name])  # transformers writes into what it is given, and cases share rope scalings
    del given["architectures"]
    config = transformers.AutoConfig.for_model(**given)
    config._attn_implementation = "eager"
    architecture = CASES[name]["architectures"][0]
    model = getattr(transformers, architecture)(config).float().eval()
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    drawn = {key: torch.from_numpy(value) for key, value in weights(name, shapes).items()}
    if config.tie_word_embeddings:
        drawn["lm_head.weight"] = drawn["model.embed_tokens.weight"]
    model.load_state_dict(drawn)
    with torch.no_grad():
        ids = torch.tensor([prompt_of(name)])
        if name in EMBEDDERS:
            body = model if architecture.endswith("Model") else model.model
            return body(ids).last_hidden_state[0, -1].numpy()
        return model(ids).logits[0].numpy()


if __name__ == "__main__":
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    np.savez_compressed(RECORDED, versions=np.array(versions), **{name: record(name) for name in CASES})
    print(versions, RECORDED.stat().st_size, "bytes")
