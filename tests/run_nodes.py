"""One stage on two nodes of one rank: a replica on each (HSDP), then one copy between them.

Launched by test_distributed.py under two torchruns, as on two machines: tests/run_nodes.py MODEL DATA OUT
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import lib.policy
import teacher_grpo

model, data, out = sys.argv[1:]
common.start_process()
for nodes, mesh in ((1, {"replicate": 2, "shard": 1}), (2, {"shard": 2})):
    found = lib.policy.device_mesh(nodes)
    assert dict(zip(found.mesh_dim_names, found.shape)) == mesh
    settings = dict(exclude=(), max_prompt_tokens=32, max_response_tokens=8, lr=1e-3, passes=1, max_steps=3)
    sizes = dict(
        prompts_per_step=4, mini_batch_prompts=2, rollouts_per_prompt=4, require_finished=False, engine="torch"
    )
    teacher_grpo.main(
        teacher_grpo.Config(model, data=data, out=f"{out}/nodes{nodes}", shard_nodes=nodes, **settings, **sizes)
    )
common.exit_process(0)
