"""The same script with the negatives of a global batch of 256, on the memory of a micro-batch.

accelerate launch examples/clip.py
Both towers embed 32 pairs at a time, and the loss compares all 256, of all processes. Its twin is
clip_accelerate.py; diff -y --width 200 examples/clip_accelerate.py examples/clip.py
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lbaccel import BatchPlan, LargeBatch, UpdateLoader


def pairs(count):
    """Generated pairs: noisy images of a scene, and a text of its tokens in any order."""
    generator = torch.Generator().manual_seed(0)
    scenes = torch.randint(32, (count, 3), generator=generator)  # three things in each
    pictures = torch.randn(32, 1, 16, 16, generator=generator)
    images = pictures[scenes].sum(1) + 0.2 * torch.randn(count, 1, 16, 16, generator=generator)
    order = torch.rand(count, 3, generator=generator).argsort(1)
    return TensorDataset(images, scenes.gather(1, order))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 32))
        self.text = nn.EmbeddingBag(32, 32)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images, tokens):
        return F.normalize(self.image(images), dim=1), F.normalize(self.text(tokens), dim=1)


def parse_arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--micro-batch-size", type=int, default=32)
    return parser.parse_args()


def embed(model, micro_batch):
    images, tokens = micro_batch
    return model(images, tokens)


def loss_fn(model, embeddings):
    return contrast(*embeddings, getattr(model, "module", model).logit_scale)


def contrast(a, b, logit_scale):
    """Radford et al. 2021, "Learning Transferable Visual Models", figure 3."""
    logits = logit_scale.exp() * a @ b.T
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def found(model, data, device):
    """How often an image finds its text among 1,000, in per cent."""
    images, tokens = (t[:1000].to(device) for t in data.tensors)
    with torch.no_grad():
        a, b = model(images, tokens)
    return 100 * ((a @ b.T).argmax(1).cpu() == torch.arange(len(a))).float().mean().item()


def main():
    args = parse_arguments()
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    set_seed(0)
    data, model = pairs(args.samples), Network()

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
        right = found(model, data, accelerator.device)
        accelerator.print(f"epoch {epoch}: loss {loss:.4f}, {right:.1f} % of the texts found")
    accelerator.end_training()


if __name__ == "__main__":
    main()
