"""Draw docs/figures/block.svg: a DBB in training, and what it becomes.

python docs/figures/block.py
"""

from pathlib import Path

import matplotlib

matplotlib.use('svg')
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch  # noqa: E402

CONV, NORM, POOL, ADD = '#cfe2f3', '#fdebc8', '#d9ead3', '#eeeeee'
INK = '#333333'
BRANCHES = {  # name -> layers, from the input down
    'kxk': [('3×3 conv', CONV), ('BN', NORM)],
    '1x1': [('1×1 conv', CONV), ('BN', NORM)],
    '1x1_kxk': [
        ('1×1 conv', CONV),
        ('BN', NORM),
        ('3×3 conv', CONV),
        ('BN', NORM),
    ],
    '1x1_avg': [
        ('1×1 conv', CONV),
        ('BN', NORM),
        ('3×3 average', POOL),
        ('BN', NORM),
    ],
}
WIDTH, HEIGHT, STEP = 1.75, 0.5, 0.78
TOP, BOTTOM = 5.0, 0.9


def box(ax, x, y, text, colour, width=WIDTH, height=HEIGHT, size=10):
    ax.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle='round,pad=0,rounding_size=0.1',
            facecolor=colour,
            edgecolor=INK,
            linewidth=1,
        )
    )
    ax.text(x, y, text, ha='center', va='center', size=size, color=INK)


def line(ax, *points, arrow=True):
    xs, ys = zip(*points)
    if arrow:
        ax.plot(xs[:-1], ys[:-1], color=INK, lw=1)
        ax.annotate(
            '',
            points[-1],
            points[-2],
            arrowprops=dict(
                arrowstyle='-|>', color=INK, lw=1, shrinkA=0, shrinkB=0
            ),
        )
    else:
        ax.plot(xs, ys, color=INK, lw=1)


def draw_block(ax):
    xs = [1.2 + 2.15 * i for i in range(len(BRANCHES))]
    middle = (xs[0] + xs[-1]) / 2
    line(ax, (middle, TOP + 0.55), (middle, TOP + 0.2), arrow=False)
    line(ax, (xs[0], TOP + 0.2), (xs[-1], TOP + 0.2), arrow=False)
    line(ax, (xs[0], BOTTOM + 0.5), (xs[-1], BOTTOM + 0.5), arrow=False)
    for x, (name, layers) in zip(xs, BRANCHES.items()):
        centre = (TOP + BOTTOM + 0.5) / 2
        ys = [
            centre + STEP * ((len(layers) - 1) / 2 - i)
            for i in range(len(layers))
        ]
        above = TOP + 0.2
        for y, (text, colour) in zip(ys, layers):
            line(ax, (x, above), (x, above), (x, y + HEIGHT / 2))
            box(ax, x, y, text, colour)
            above = y - HEIGHT / 2
        line(ax, (x, above), (x, BOTTOM + 0.5), arrow=False)
        ax.text(
            x + 0.07,
            TOP + 0.02,
            name,
            ha='left',
            va='top',
            size=9,
            family='monospace',
            color='#777777',
        )
    line(
        ax,
        (middle, BOTTOM + 0.5),
        (middle, BOTTOM + 0.5),
        (middle, BOTTOM + 0.25),
    )
    ax.add_patch(
        plt.Circle((middle, BOTTOM), 0.25, facecolor=ADD, edgecolor=INK)
    )
    ax.text(middle, BOTTOM, '+', ha='center', va='center', size=13, color=INK)
    line(ax, (middle, BOTTOM - 0.25), (middle, BOTTOM - 0.25), (middle, 0.2))
    ax.text(
        middle,
        TOP + 1.0,
        'in training: DBB',
        ha='center',
        va='center',
        size=12,
        color=INK,
        weight='bold',
    )


def draw_merged(ax):
    x, y = 12.6, (TOP + BOTTOM + 0.5) / 2
    ax.add_patch(
        FancyArrowPatch(
            (9.1, y),
            (11.2, y),
            arrowstyle='simple,head_width=16,head_length=14,tail_width=6',
            facecolor='#888888',
            edgecolor='none',
        )
    )
    ax.text(
        10.1,
        y + 0.4,
        'reparameterize',
        ha='center',
        size=10,
        family='monospace',
        color=INK,
    )
    ax.text(
        10.1, y - 0.6, 'once, exactly', ha='center', size=10, color='#777777'
    )
    line(ax, (x, TOP + 0.55), (x, TOP + 0.55), (x, y + 0.35))
    box(ax, x, y, '3×3 conv + bias', CONV, width=2.7, height=0.7, size=11)
    line(ax, (x, y - 0.35), (x, y - 0.35), (x, 0.2))
    ax.text(
        x,
        TOP + 1.0,
        'for inference: nn.Conv2d',
        ha='center',
        va='center',
        size=12,
        color=INK,
        weight='bold',
    )


def main(path=None):
    path = path or Path(__file__).with_suffix('.svg')
    plt.rcParams['svg.fonttype'] = 'path'  # the same on every machine
    plt.rcParams['svg.hashsalt'] = 'mmdbb'
    fig, ax = plt.subplots(figsize=(10.5, 4.6))
    fig.patch.set_facecolor('white')
    draw_block(ax)
    draw_merged(ax)
    ax.set(xlim=(0.1, 14.3), ylim=(0, 6.3), aspect='equal')
    ax.axis('off')
    fig.savefig(
        path,
        bbox_inches='tight',
        pad_inches=0.1,
        metadata=dict(Date=None),
    )
    plt.close(fig)
    return path


if __name__ == '__main__':
    main()
