"""The original's networks as plain Paddle layers, by their published shapes and the names of their weights.

`paddle_parity.py` runs them; Paddle is needed, recnb is not.
"""

import itertools

import paddle
from paddle import nn
from paddle.nn import functional as F


class ConvBN(nn.Layer):
    """A convolution without a bias, a batch norm and an activation."""

    def __init__(self, channels, out, size, stride=1, groups=1, act=None, pooled=False):
        super().__init__()
        self.conv = nn.Conv2D(channels, out, size, 1 if pooled else stride, size // 2, groups=groups, bias_attr=False)
        self.bn = nn.BatchNorm2D(out)
        self.act = act
        self.pool = nn.AvgPool2D(stride, stride, ceil_mode=True) if pooled and stride > 1 else None

    def forward(self, x):
        x = self.bn(self.conv(x if self.pool is None else self.pool(x)))
        return x if self.act is None else self.act(x)


class Bottleneck(nn.Layer):
    """A block of a ResNet of 50 layers or more; `pooled`: its shortcut halves by averaging."""

    def __init__(self, channels, width, stride, short, pooled):
        super().__init__()
        self.conv0 = ConvBN(channels, width, 1, act=F.relu)
        self.conv1 = ConvBN(width, width, 3, stride, act=F.relu)
        self.conv2 = ConvBN(width, 4 * width, 1)
        if short:
            self.short = ConvBN(channels, 4 * width, 1, stride, pooled=pooled)
        self.has_short = short

    def forward(self, x):
        return F.relu(self.conv2(self.conv1(self.conv0(x))) + (self.short(x) if self.has_short else x))


class ResNet50(nn.Layer):
    """ResNet50, its form `vd`, and the one whose last stage keeps the size of its maps."""

    def __init__(self, vd=False, last_stride=2, class_num=1000):
        super().__init__()
        stem = [(3, 32, 3, 2), (32, 32, 3, 1), (32, 64, 3, 1)] if vd else [(3, 64, 7, 2)]
        self.stem = nn.Sequential(*(ConvBN(*sizes, act=F.relu) for sizes in stem))
        blocks, channels = [], 64
        for stage, (width, depth) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True)):
            for i in range(depth):
                stride = 1 if i or not stage else last_stride if stage == 3 else 2
                blocks.append(Bottleneck(channels, width, stride, not i, vd and stage > 0))
                channels = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(2048, class_num)

    def features(self, x):
        x = self.blocks(F.max_pool2d(self.stem(x), 3, 2, 1))
        return x.mean([2, 3])

    def forward(self, x):
        return self.fc(self.features(x))


class Excitation(nn.Layer):
    """Squeeze and excitation with a gate of one's choice."""

    def __init__(self, channels, gate):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2D(channels, channels // 4, 1), nn.Conv2D(channels // 4, channels, 1)
        self.gate = gate

    def forward(self, x):
        return x * self.gate(self.conv2(F.relu(self.conv1(x.mean([2, 3], keepdim=True)))))


class Pooled(nn.Layer):
    """A convolution, its activation and a pooling, as AlexNet names them."""

    def __init__(self, *sizes):
        super().__init__()
        self._conv = nn.Conv2D(*sizes)

    def forward(self, x):
        return F.max_pool2d(F.relu(self._conv(x)), 3, 2)


class AlexNet(nn.Layer):
    """AlexNet: rows of channels in and out, kernel size, stride and padding."""

    def __init__(self, class_num=1000):
        super().__init__()
        self._conv1, self._conv2 = Pooled(3, 64, 11, 4, 2), Pooled(64, 192, 5, 1, 2)
        self._conv3, self._conv4 = nn.Conv2D(192, 384, 3, 1, 1), nn.Conv2D(384, 256, 3, 1, 1)
        self._conv5, self.dropout = Pooled(256, 256, 3, 1, 1), nn.Dropout(0.5, mode="downscale_in_infer")
        self._fc6, self._fc7, self._fc8 = nn.Linear(9216, 4096), nn.Linear(4096, 4096), nn.Linear(4096, class_num)

    def features(self, x):
        x = F.relu(self._conv4(F.relu(self._conv3(self._conv2(self._conv1(x))))))
        x = F.relu(self._fc6(self.dropout(self._conv5(x).flatten(1))))
        return F.relu(self._fc7(self.dropout(x)))

    def forward(self, x):
        return self._fc8(self.features(x))


class ConvBlock(nn.Layer):
    """Convolutions without a bias of a VGG, and a pooling."""

    def __init__(self, channels, out, count):
        super().__init__()
        self.count = count
        for i in range(1, count + 1):
            setattr(self, f"conv{i}", nn.Conv2D(channels if i == 1 else out, out, 3, padding=1, bias_attr=False))

    def forward(self, x):
        for i in range(1, self.count + 1):
            x = F.relu(getattr(self, f"conv{i}")(x))
        return F.max_pool2d(x, 2, 2)


class VGG19(nn.Layer):
    """VGG of 19 layers."""

    def __init__(self, class_num=1000):
        super().__init__()
        widths = [3, 64, 128, 256, 512, 512]
        for i, count in enumerate((2, 2, 4, 4, 4)):
            setattr(self, f"conv_block_{i + 1}", ConvBlock(widths[i], widths[i + 1], count))
        self.dropout = nn.Dropout(0.5, mode="downscale_in_infer")
        self.fc1, self.fc2, self.fc3 = nn.Linear(25088, 4096), nn.Linear(4096, 4096), nn.Linear(4096, class_num)

    def features(self, x):
        for i in range(1, 6):
            x = getattr(self, f"conv_block_{i}")(x)
        x = self.dropout(F.relu(self.fc1(x.flatten(1))))
        return self.dropout(F.relu(self.fc2(x)))

    def forward(self, x):
        return self.fc3(self.features(x))


class Separable(nn.Layer):
    """A depthwise and a pointwise convolution, under the names of PP-LCNet or MobileNetV1."""

    def __init__(self, channels, out, size, stride, act, excited=False, names=("dw_conv", "pw_conv")):
        super().__init__()
        self.names = names
        setattr(self, names[0], ConvBN(channels, channels, size, stride, channels, act))
        if excited:
            self.se = Excitation(channels, F.hardsigmoid)
        self.excited = excited
        setattr(self, names[1], ConvBN(channels, out, 1, act=act))

    def forward(self, x):
        x = getattr(self, self.names[0])(x)
        return getattr(self, self.names[1])(self.se(x) if self.excited else x)


class Tail(nn.Layer):
    """What small networks end in: a wide layer behind the pooling, a dropout that scales in evaluation, a linear."""

    def wide(self, channels, act, dropout=0.2, class_num=1000, expand=1280):
        self.last_conv = nn.Conv2D(channels, expand, 1, bias_attr=False)
        self.last_act, self.dropout = act, nn.Dropout(dropout, mode="downscale_in_infer")
        self.fc = nn.Linear(expand, class_num)

    def features(self, x):
        x = self.last_conv(self.maps(x).mean([2, 3], keepdim=True))
        return self.dropout(x if self.last_act is None else self.last_act(x)).flatten(1)

    def forward(self, x):
        return self.fc(self.features(x))


def eighths(value):
    """The nearest multiple of 8, but no less than nine tenths of the value."""
    near = max(8, int(value + 4) // 8 * 8)
    return near + 8 if near < 0.9 * value else near


STAGES = {
    2: [(3, 16, 32, 1, False)],
    3: [(3, 32, 64, 2, False), (3, 64, 64, 1, False)],
    4: [(3, 64, 128, 2, False), (3, 128, 128, 1, False)],
    5: [(3, 128, 256, 2, False), *[(5, 256, 256, 1, False)] * 5],
    6: [(5, 256, 512, 2, True), (5, 512, 512, 1, True)],
}


class PPLCNet(Tail):
    """PP-LCNet of a width; its rows are kernel size, channels in and out, stride, and whether there is a gate."""

    def __init__(self, width, class_num=1000):
        super().__init__()
        self.conv1 = ConvBN(3, eighths(16 * width), 3, 2, act=F.hardswish)
        for stage, rows in STAGES.items():
            blocks = [
                Separable(eighths(i * width), eighths(o * width), size, stride, F.hardswish, gate)
                for size, i, o, stride, gate in rows
            ]
            setattr(self, f"blocks{stage}", nn.Sequential(*blocks))
        self.wide(eighths(512 * width), F.hardswish, class_num=class_num)

    def maps(self, x):
        x = self.conv1(x)
        for stage in STAGES:
            x = getattr(self, f"blocks{stage}")(x)
        return x


class Branched(nn.Layer):
    """A block of PP-LCNetV2."""

    def __init__(
        self, channels, out, size, stride, split=False, branched=False, excited=False, shortcut=False, smallest=1
    ):
        super().__init__()
        self.branched, self.excited, self.split = branched, excited, split
        self.shortcut = shortcut and channels == out
        if branched:
            sizes = range(size, smallest - 1, -2)
            self.dw_conv_list = nn.LayerList([ConvBN(channels, channels, s, stride, channels) for s in sizes])
            self.dw_conv = nn.Conv2D(channels, channels, size, stride, size // 2, groups=channels)
        else:
            self.dw_conv = ConvBN(channels, channels, size, stride, channels, F.relu)
        if excited:
            self.se = Excitation(channels, F.sigmoid)
        if split:
            self.pw_conv_1 = ConvBN(channels, out // 2, 1, act=F.relu)
            self.pw_conv_2 = ConvBN(out // 2, out, 1, act=F.relu)
        else:
            self.pw_conv = ConvBN(channels, out, 1, act=F.relu)

    def forward(self, x):
        y = F.relu(sum(branch(x) for branch in self.dw_conv_list)) if self.branched else self.dw_conv(x)
        y = self.se(y) if self.excited else y
        y = self.pw_conv_2(self.pw_conv_1(y)) if self.split else self.pw_conv(y)
        return x + y if self.shortcut else y


class PPLCNetV2(Tail):
    """PP-LCNetV2 base, or the form of PP-ShiTuV2."""

    def __init__(self, shitu=False, class_num=1000, expand=1280):
        super().__init__()
        self.stem = nn.Sequential(ConvBN(3, 32, 3, 2, act=F.relu), Branched(32, 64, 3, 1))
        third = {"split": True, "branched": True, "excited": True}
        rows = [(64, 3, 2, {}), (128, 3, 2, {}), (256, 5, 6, third), (512, 5, 2, {"branched": True, "shortcut": True})]
        self.stages = nn.LayerList()
        for width, size, depth, options in rows:
            stride = 1 if shitu and width == 512 else 2
            first = Branched(width, 2 * width, size, stride, smallest=3, **options)
            rest = [Branched(2 * width, 2 * width, size, 1, **options) for _ in range(depth - 1)]
            self.stages.append(nn.Sequential(first, *rest))
        self.wide(1024, None if shitu else F.relu, class_num=class_num, expand=expand)

    def maps(self, x):
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return x


class Inverted(nn.Layer):
    """A block of MobileNetV3."""

    def __init__(self, channels, middle, out, size, stride, excited, act):
        super().__init__()
        self.shortcut, self.excited = stride == 1 and channels == out, excited
        self.expand_conv = ConvBN(channels, middle, 1, act=act)
        self.bottleneck_conv = ConvBN(middle, middle, size, stride, middle, act)
        if excited:
            self.mid_se = Excitation(middle, lambda x: (0.2 * x + 0.5).clip(0, 1))
        self.linear_conv = ConvBN(middle, out, 1)

    def forward(self, x):
        y = self.bottleneck_conv(self.expand_conv(x))
        y = self.linear_conv(self.mid_se(y) if self.excited else y)
        return x + y if self.shortcut else y


LARGE = [
    *[(3, 16, 16, 0, F.relu, 1), (3, 64, 24, 0, F.relu, 2), (3, 72, 24, 0, F.relu, 1), (5, 72, 40, 1, F.relu, 2)],
    *[(5, 120, 40, 1, F.relu, 1)] * 2,
    *[(3, 240, 80, 0, F.hardswish, 2), (3, 200, 80, 0, F.hardswish, 1), *[(3, 184, 80, 0, F.hardswish, 1)] * 2],
    *[(3, 480, 112, 1, F.hardswish, 1), (3, 672, 112, 1, F.hardswish, 1), (5, 672, 160, 1, F.hardswish, 2)],
    *[(5, 960, 160, 1, F.hardswish, 1)] * 2,
]
SMALL = [
    *[(3, 16, 16, 1, F.relu, 2), (3, 72, 24, 0, F.relu, 2), (3, 88, 24, 0, F.relu, 1), (5, 96, 40, 1, F.hardswish, 2)],
    *[(5, 240, 40, 1, F.hardswish, 1)] * 2,
    *[(5, 120, 48, 1, F.hardswish, 1), (5, 144, 48, 1, F.hardswish, 1), (5, 288, 96, 1, F.hardswish, 2)],
    *[(5, 576, 96, 1, F.hardswish, 1)] * 2,
]


class MobileNetV3(Tail):
    """MobileNetV3: rows of kernel size, channels in the middle and out, whether there is a gate, activation, stride."""

    def __init__(self, large=True, class_num=1000):
        super().__init__()
        self.conv, channels, blocks = ConvBN(3, 16, 3, 2, act=F.hardswish), 16, []
        for size, middle, out, excited, act, stride in LARGE if large else SMALL:
            blocks.append(Inverted(channels, middle, out, size, stride, excited, act))
            channels = out
        self.blocks = nn.Sequential(*blocks)
        self.last_second_conv = ConvBN(channels, 960 if large else 576, 1, act=F.hardswish)
        self.wide(960 if large else 576, F.hardswish, class_num=class_num)

    def maps(self, x):
        return self.last_second_conv(self.blocks(self.conv(x)))


class MobileNetV1(nn.Layer):
    """MobileNetV1."""

    def __init__(self, class_num=1000):
        super().__init__()
        self.conv = ConvBN(3, 32, 3, 2, act=F.relu)
        widths = [32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]
        halved, names = (1, 3, 5, 11), ("depthwise_conv", "pointwise_conv")
        pairs = enumerate(itertools.pairwise(widths))
        self.blocks = nn.Sequential(
            *(Separable(i, o, 3, 2 if n in halved else 1, F.relu, names=names) for n, (i, o) in pairs)
        )
        self.fc = nn.Linear(1024, class_num)

    def features(self, x):
        return self.blocks(self.conv(x)).mean([2, 3])

    def forward(self, x):
        return self.fc(self.features(x))


class MLP(nn.Layer):
    """The two linear layers of a transformer's block."""

    def __init__(self, width, act):
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), act

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Attention(nn.Layer):
    """Attention over tokens (N, L, C), with a bias for each pair of a window's places where a window is given."""

    def __init__(self, width, heads, window=0):
        super().__init__()
        self.heads = heads
        if window:
            self.relative_position_bias_table = self.create_parameter([(2 * window - 1) ** 2, heads])
            rows, columns = paddle.meshgrid(paddle.arange(window), paddle.arange(window))
            rows, columns = rows.flatten(), columns.flatten()
            index = (rows[:, None] - rows + window - 1) * (2 * window - 1) + columns[:, None] - columns + window - 1
            self.register_buffer("relative_position_index", index)
        self.window, self.qkv, self.proj = window, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, mask=None):
        count, length, width = x.shape
        q, k, v = self.qkv(x).reshape([count, length, 3, self.heads, -1]).transpose([2, 0, 3, 1, 4])
        scores = q @ k.transpose([0, 1, 3, 2]) * (width // self.heads) ** -0.5
        if self.window:
            bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
            scores = scores + bias.reshape([length, length, -1]).transpose([2, 0, 1])
        if mask is not None:  # (windows, L, L)
            scores = scores.reshape([-1, len(mask), self.heads, length, length]) + mask[:, None]
            scores = scores.reshape([count, self.heads, length, length])
        return self.proj((F.softmax(scores, -1) @ v).transpose([0, 2, 1, 3]).reshape([count, length, width]))


class Patches(nn.Layer):
    """Patches of an image as tokens (N, L, C)."""

    def __init__(self, size, width, bias=True, norm=False):
        super().__init__()
        self.proj = nn.Conv2D(3, width, size, size, bias_attr=None if bias else False)
        self.normed = norm
        if norm:
            self.norm = nn.LayerNorm(width)

    def forward(self, x):
        x = self.proj(x).flatten(2).transpose([0, 2, 1])
        return self.norm(x) if self.normed else x


class Block(nn.Layer):
    """A block of a transformer."""

    def __init__(self, width, heads, epsilon, act, window=0):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, epsilon), Attention(width, heads, window)
        self.norm2, self.mlp = nn.LayerNorm(width, epsilon), MLP(width, act)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Layer):
    """A vision transformer; `clip`: the one of CLIP, whose tokens are projected and averaged from `first` on."""

    def __init__(self, patch=16, width=768, depth=12, heads=12, clip=False, conv_bias=True, size=224, first=1):
        super().__init__()
        self.clip, self.first, epsilon = clip, first, 1e-5 if clip else 1e-6
        self.patch_embed = Patches(patch, width, conv_bias)
        self.pos_embed = self.create_parameter([1, (size // patch) ** 2 + 1, width])
        self.cls_token = self.create_parameter([1, 1, width])
        if clip:
            self.ln_pre, self.proj = nn.LayerNorm(width), self.create_parameter([width, 512])
        act = (lambda x: x * F.sigmoid(1.702 * x)) if clip else F.gelu
        self.blocks = nn.LayerList([Block(width, heads, epsilon, act) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, epsilon)
        if not clip:
            self.head = nn.Linear(width, 1000)

    def features(self, x):
        x = paddle.concat([self.cls_token.expand([len(x), -1, -1]), self.patch_embed(x)], 1) + self.pos_embed
        x = self.ln_pre(x) if self.clip else x
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return (x[:, self.first :] @ self.proj).mean(1) if self.clip else x[:, 0]

    def forward(self, x):
        return self.features(x) if self.clip else self.head(self.features(x))


class SwinBlock(Block):
    """A block of a Swin transformer: attention within windows, moved by half of one in every other block."""

    def __init__(self, width, heads, side, moved):
        super().__init__(width, heads, 1e-5, F.gelu, 7)
        self.side, self.moved = side, 3 if moved and side > 7 else 0
        places = paddle.zeros([1, side, side, 1])
        for n, (rows, columns) in enumerate((a, b) for a in self.parts() for b in self.parts()):
            places[:, rows, columns] = n
        kind = self.windows(places).squeeze(-1)
        mask = (kind[:, None] != kind[:, :, None]).astype("float32") * -100
        self.register_buffer("attn_mask", mask if self.moved else None)

    def parts(self):
        return (slice(0, -7), slice(-7, -3), slice(-3, None)) if self.moved else (slice(None),)

    def windows(self, x):  # (N, side, side, C) -> (N * windows, 49, C)
        n = self.side // 7
        return x.reshape([-1, n, 7, n, 7, x.shape[-1]]).transpose([0, 1, 3, 2, 4, 5]).reshape([-1, 49, x.shape[-1]])

    def forward(self, x):  # (N, side * side, C)
        n, width = self.side // 7, x.shape[-1]
        y = self.norm1(x).reshape([-1, self.side, self.side, width])
        y = self.attn(self.windows(paddle.roll(y, [-self.moved] * 2, [1, 2])), self.attn_mask)
        y = y.reshape([-1, n, n, 7, 7, width]).transpose([0, 1, 3, 2, 4, 5])
        y = paddle.roll(y.reshape([-1, self.side, self.side, width]), [self.moved] * 2, [1, 2])
        x = x + y.reshape(x.shape)
        return x + self.mlp(self.norm2(x))


class Merging(nn.Layer):
    """Four neighbours become one token."""

    def __init__(self, width, side):
        super().__init__()
        self.side, self.norm = side, nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias_attr=False)

    def forward(self, x):
        half = self.side // 2
        x = x.reshape([-1, half, 2, half, 2, x.shape[-1]]).transpose([0, 1, 3, 4, 2, 5])
        return self.reduction(self.norm(x.reshape([len(x), half * half, -1])))


class Stage(nn.Layer):
    """A stage of a Swin transformer."""

    def __init__(self, width, heads, side, depth, last):
        super().__init__()
        self.blocks = nn.LayerList([SwinBlock(width, heads, side, i % 2) for i in range(depth)])
        self.last = last
        if not last:
            self.downsample = Merging(width, side)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x if self.last else self.downsample(x)


class Swin(nn.Layer):
    """A Swin transformer of the size tiny."""

    def __init__(self, width=96, depths=(2, 2, 6, 2)):
        super().__init__()
        self.patch_embed = Patches(4, width, norm=True)
        self.layers = nn.LayerList(
            [Stage(width * 2**i, 3 * 2**i, 56 // 2**i, depth, i == 3) for i, depth in enumerate(depths)]
        )
        self.norm, self.head = nn.LayerNorm(8 * width), nn.Linear(8 * width, 1000)

    def features(self, x):
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x).mean(1)

    def forward(self, x):
        return self.head(self.features(x))


class Linear(nn.Layer):
    """The neck and the head FC."""

    def __init__(self, size, out):
        super().__init__()
        self.fc = nn.Linear(size, out)

    def forward(self, x):
        return self.fc(x)


class BNNeck(nn.Layer):
    """The neck of a batch norm."""

    def __init__(self, size):
        super().__init__()
        self.feat_bn = nn.BatchNorm1D(size)

    def forward(self, x):
        return self.feat_bn(x)


class VehicleNeck(nn.Layer):
    """The neck of a convolution."""

    def __init__(self, channels, out):
        super().__init__()
        self.conv = nn.Conv2D(channels, out, 1)

    def forward(self, x):
        return self.conv(x[:, :, None, None]).flatten(1)


class Cosine(nn.Layer):
    """A head of cosines, whose weight is (embedding, classes)."""

    def __init__(self, size, classes):
        super().__init__()
        self.weight = self.create_parameter([size, classes])

    def forward(self, x):
        return F.normalize(x, axis=1) @ F.normalize(self.weight, axis=0)


class RecModel(nn.Layer):
    """A backbone without its last layer, a neck and a head."""

    def __init__(self, backbone, neck, head):
        super().__init__()
        if hasattr(backbone, "fc"):
            backbone.fc = nn.Identity()
        self.backbone, self.neck, self.head = backbone, neck, head

    def features(self, x):
        x = self.backbone.features(x)
        return x if self.neck is None else self.neck(x)

    def forward(self, x):
        return self.head(self.features(x))
