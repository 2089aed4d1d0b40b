"""CLIP on generated pairs with Accelerate: an ordinary script.

accelerate launch examples/clip_accelerate.py
Each image has the other texts of its batch of 32 as negatives. Its twin is clip.py; what differs:
diff -y --width 200 examples/clip_accelerate.py examples/clip.py
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


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


def loss_fn(model, batch):
    images, tokens = batch
    return contrast(*model(images, tokens), getattr(model, "module", model).logit_scale)


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

    loader = DataLoader(data, args.micro_batch_size, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.002)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    for epoch in range(args.epochs):
        model.train()
        for batch in loader:
            loss = loss_fn(model, batch)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()

        model.eval()
        right = found(model, data, accelerator.device)
        accelerator.print(
            f"epoch {epoch}: loss {loss.item():.4f}, {right:.1f} % of the texts found"
        )
    accelerator.end_training()


if __name__ == "__main__":
    main()
