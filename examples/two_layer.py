"""Two layers, one line changed: Adam comes from shardadam.

python examples/two_layer.py
torchrun --standalone --nproc-per-node 2 examples/two_layer.py
"""

import torch
import torch.distributed as dist
from torch import nn

from shardadam import Adam

rank, world_size = 0, 1
if dist.is_torchelastic_launched():
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)
inputs = torch.randn(1024, 16)
targets = torch.sin(inputs @ torch.randn(16, 1) / 4)
inputs, targets = inputs[rank::world_size], targets[rank::world_size]

model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))
criterion = nn.MSELoss()
optimizer = Adam(model.parameters(), lr=0.001, betas=(0.9, 0.999))

for epoch in range(1, 101):
    optimizer.zero_grad()
    loss = criterion(model(inputs), targets)
    loss.backward()
    optimizer.step()
    if epoch % 10 == 0 and rank == 0:
        print(f"epoch {epoch:3}: loss {loss.item():.4f}")

if world_size > 1:
    dist.destroy_process_group()
