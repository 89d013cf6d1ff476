"""Data sets of real photographs in the layouts that docs/own_data.md shows.

Crops of the two photographs that scikit-learn ships: a dahlia, with a second
one at the border, and a temple. Boxes were drawn by hand; the flowers' pixels
are those with much more red than blue, which nothing else there has.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

#: Photograph -> class and box (left, top, right, bottom) of what is in it.
BOXES = {
    'flower.jpg': [
        ('flower', (169, 85, 446, 358)),
        ('flower', (288, 375, 468, 427)),
    ],
    'china.jpg': [('temple', (63, 29, 372, 420))],
}
CLASSES = ('flower', 'temple')
SPLITS = dict(train=4, val=2)


def photographs():
    """The two photographs by name, (height, width, 3) uint8."""
    from sklearn.datasets import load_sample_images

    found = load_sample_images()
    names = [Path(name).name for name in found.filenames]
    return dict(zip(names, found.images))


def crops(name, image, count, seed):
    """Parts of a photograph at a quarter of its size, wide and tall ones."""
    rng = np.random.default_rng([seed, len(name)])
    height, width = image.shape[:2]
    for index in range(count):
        w, h = (480, 380) if index % 2 else (380, 420)
        left = int(rng.integers(width - w + 1))
        top = int(rng.integers(height - h + 1))
        boxes = []
        for label, (x1, y1, x2, y2) in BOXES[name]:
            x1, x2 = (min(max(x - left, 0), w) for x in (x1, x2))
            y1, y2 = (min(max(y - top, 0), h) for y in (y1, y2))
            if x2 - x1 > 40 and y2 - y1 > 40:
                boxes.append((label, [v / 4 for v in (x1, y1, x2, y2)]))
        part = Image.fromarray(image[top : top + h, left : left + w])
        yield part.resize((w // 4, h // 4)), boxes


def samples():
    """Split, name of a file, image and boxes of all crops."""
    for name, image in photographs().items():
        for seed, (split, count) in enumerate(SPLITS.items()):
            for index, (part, boxes) in enumerate(
                crops(name, image, count, seed)
            ):
                yield split, f'{Path(name).stem}_{index}', part, boxes


def classification(root):
    """Folders of classes."""
    for split, name, image, _ in samples():
        label = 'temple' if name.startswith('china') else 'flower'
        path = root / split / label / f'{name}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=95)
    return root


def detection(root):
    """COCO's format."""
    content = {
        split: dict(
            images=[],
            annotations=[],
            categories=[dict(id=3, name='temple'), dict(id=7, name='flower')],
        )
        for split in SPLITS
    }
    for split, name, image, boxes in samples():
        path = root / split / f'{name}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=95)
        mine = content[split]
        number = len(mine['images'])
        mine['images'].append(
            dict(
                id=number,
                file_name=path.name,
                width=image.width,
                height=image.height,
            )
        )
        for label, (x1, y1, x2, y2) in boxes:
            mine['annotations'].append(
                dict(
                    id=len(mine['annotations']) + 1,
                    image_id=number,
                    category_id=7 if label == 'flower' else 3,
                    bbox=[x1, y1, x2 - x1, y2 - y1],
                    area=(x2 - x1) * (y2 - y1),
                    iscrowd=0,
                )
            )
    for split, mine in content.items():
        (root / f'{split}.json').write_text(json.dumps(mine))
    return root


def segmentation(root):
    """Images and label maps."""
    for split, name, image, _ in samples():
        pixels = np.asarray(image).astype(int)
        labels = (pixels[..., 0] - pixels[..., 2] > 60) * (
            1 if name.startswith('flower') else 0
        )
        for folder, content in (
            ('images', image),
            ('labels', Image.fromarray(labels.astype(np.uint8))),
        ):
            path = root / folder / split
            path.mkdir(parents=True, exist_ok=True)
            suffix = '.jpg' if folder == 'images' else '.png'
            content.save(path / f'{name}{suffix}')
    return root
