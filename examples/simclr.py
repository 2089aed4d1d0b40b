"""The same script with the negatives of a global batch of 256, on the memory of a micro-batch.

accelerate launch examples/simclr.py
The network embeds 32 images at a time, and the loss compares all 256, of all processes. Its twin is
simclr_accelerate.py; diff -y --width 200 examples/simclr_accelerate.py examples/simclr.py
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from lbaccel import BatchPlan, LargeBatch, UpdateLoader


class Patterns(Dataset):
    """Two views, each shifted and noisy, of a generated image of one of eight patterns."""

    def __init__(self, count):
        generator = torch.Generator().manual_seed(0)
        patterns = torch.randn(8, 1, 16, 16, generator=generator)
        self.labels = torch.arange(count) % 8
        self.images = patterns[self.labels] + 0.5 * torch.randn(
            count, 1, 16, 16, generator=generator
        )

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return view(self.images[index]), view(self.images[index])


def view(image):
    shift = torch.randint(-2, 3, (2,)).tolist()
    return image.roll(shift, (1, 2)) + 0.5 * torch.randn_like(image)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, 2, 1), nn.GroupNorm(4, 32), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 32)),
        )

    def forward(self, images):
        return F.normalize(self.body(images), dim=1)


def parse_arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--micro-batch-size", type=int, default=32)
    return parser.parse_args()


def embed(model, micro_batch):
    a, b = micro_batch
    return model(a), model(b)


def loss_fn(model, embeddings):
    return nt_xent(*embeddings)


def nt_xent(a, b, temperature=0.5):
    """Chen et al. 2020, "A Simple Framework for Contrastive Learning", equation 1."""
    z = torch.cat([a, b])
    logits = z @ z.T / temperature
    logits.fill_diagonal_(-torch.inf)
    partner = torch.arange(len(z), device=z.device).roll(len(a))
    return F.cross_entropy(logits, partner)


def neighbours(model, data, device):
    """How often the nearest other image has the same pattern, in per cent."""
    with torch.no_grad():
        z = model(data.images.to(device)).cpu()
    nearest = (z @ z.T).fill_diagonal_(-torch.inf).argmax(1)
    return 100 * (data.labels[nearest] == data.labels).float().mean().item()


def main():
    args = parse_arguments()
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    set_seed(0)
    data, model = Patterns(args.samples), Network()

    batch = {"global_batch_size": 256, "micro_batch_size": args.micro_batch_size}
    plan = BatchPlan(**batch, world_size=accelerator.num_processes)
    loader = UpdateLoader(data, plan, rank=accelerator.process_index)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    large_batch = LargeBatch(accelerator, plan)
    model, optimizer, loader = large_batch.prepare(model, optimizer, loader)

    for epoch in range(args.epochs):
        model.train()
        for update in loader:
            loss = large_batch.update(update, loss_fn, embed=embed).loss

        model.eval()
        right = neighbours(model, data, accelerator.device)
        accelerator.print(f"epoch {epoch}: loss {loss:.4f}, nearest neighbours {right:.1f} % right")
    accelerator.end_training()


if __name__ == "__main__":
    main()
