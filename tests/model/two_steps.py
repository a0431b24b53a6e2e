"""A process of its own that trains two steps and prints what it did, as JSON: ``python -m tests.model.two_steps [bytes]``.

What is printed must not depend on which traces an earlier process left: losses, gradients as bits, the code of all graphs, the report.
"""

from __future__ import annotations

import hashlib
import json
import sys

import torch

import fxfuse
from fxfuse.earlier_traces import seam
from fxfuse.reporting.records import attached
from tests.model.builders import llama, tokens


def main(memory: str) -> None:
    torch.set_num_threads(1)
    model = fxfuse.optimize(llama(1), **({"memory": int(memory)} if memory else {}))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batch = tokens(batch=2, length=16)
    losses, bits = [], hashlib.sha256()
    for _ in range(2):
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item().hex())
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                bits.update(name.encode() + parameter.grad.detach().double().numpy().tobytes())
        optimizer.step()
        optimizer.zero_grad()
    records = [record for module in model.modules() for record in attached(module)]
    sources = sorted({record.forward_source + record.backward_source for record in records})
    report = fxfuse.report(model)
    print(json.dumps({"traces": dict(seam.counts), "losses": losses, "gradients": bits.hexdigest(), "sources": sources,
                      "report": json.loads(report.to_json()), "text": str(report)}))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
