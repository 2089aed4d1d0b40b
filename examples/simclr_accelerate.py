"""SimCLR on generated images with Accelerate: an ordinary script.

accelerate launch examples/simclr_accelerate.py
Each image has the others of its batch of 32 as negatives. Its twin is simclr.py; what differs:
diff -y --width 200 examples/simclr_accelerate.py examples/simclr.py
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset


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


def loss_fn(model, batch):
    a, b = batch
    return nt_xent(model(a), model(b))


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
        right = neighbours(model, data, accelerator.device)
        accelerator.print(
            f"epoch {epoch}: loss {loss.item():.4f}, nearest neighbours {right:.1f} % right"
        )
    accelerator.end_training()


if __name__ == "__main__":
    main()
