# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The base of all blocks: a convolution that can be merged."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
from types import MethodType
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Iterator,
    Optional,
    Protocol,
    Sequence,
    Tuple,
    Union,
)

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mmdbb.blocks.block_type import BlockType
from mmdbb.blocks.equivalent import equivalent, is_settable
from mmdbb.blocks.offers import TakesPlainWeights
from mmdbb.branches.base import leaf_dtype, take_geometry
from mmdbb.dimensions import LayerKind
from mmdbb.geometry import ConvSpec, IntPair, convolve
from mmdbb.modules import (
    cast,
    fresh_weights,
    memory_format_of,
    reset_children_,
    shadow,
    tensors_of,
)
from mmdbb.plain_conv import AdaptiveConv2d, plain_conv
from mmdbb.ports import PORTS
from mmdbb.recompute import without_autocast
from mmdbb.registry import BLOCKS
from mmdbb.transforms import KernelBias, swap_channels

#: Precisions in which kernels can be composed.
COMPOSED_IN = (torch.float64, torch.float32)


def _geometry(name: str, fixed: bool = False) -> Any:
    """A property for an attribute of ``nn.Conv2d``, kept in the block's spec.

    Args:
        name: Name of the attribute.
        fixed: Whether setting it to another value raises.
    """

    def get(self: ReparamConv2d):
        return getattr(self.spec, name)

    def put(self: ReparamConv2d, value) -> None:
        changes = {name: value}
        if self.adaptive_padding and not fixed:
            if name == 'padding':
                raise ValueError(
                    f'padding of a {type(self).__name__} with '
                    f'adaptive_padding=True follows from the image, got '
                    f'{value!r}'
                )
            changes['padding'] = 'adaptive'
        spec = dataclasses.replace(self.spec, **changes)
        if fixed and spec != self.spec:
            raise ValueError(
                f'{name} of a {type(self).__name__} is fixed when it is '
                f'built: {getattr(self.spec, name)}, got {value}; build '
                'another block'
            )
        if spec != self.spec:
            self.set_spec(spec)

    return property(get, put)


class ReparamConv2d(TakesPlainWeights, metaclass=BlockType):
    """A convolution that is trained as several branches, and can be merged.

    From outside it looks like an ``nn.Conv2d``: same arguments, attributes and
    shapes. A subclass builds its branches unless ``deploy`` is true, computes
    them in :meth:`forward_train` and :meth:`forward_branches`, and merges
    them in :meth:`_compose`.

    It is the base of the other forms too: a subclass with ``dims = 3`` looks
    like an ``nn.Conv3d``, one with ``transposed = True`` like an
    ``nn.ConvTranspose2d``.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel, or one number.
        stride: Step in pixels.
        padding: Pixels on each side, ``'same'`` or ``'valid'``.
        dilation: Distance between two neighbouring taps in pixels.
        groups: Number of groups that channels are split into.
        bias: Whether the block adds a bias. It is no extra parameter where
            the norms of the block add one already.
        padding_mode: ``zeros``, ``reflect``, ``replicate`` or ``circular``.
        deploy: Whether to build the merged convolution at once, into which
            merged weights can be loaded.
        init_cfg: mmengine's initialisation rules for this block.
        adaptive_padding: Whether to pad each image as mmcv's
            ``Conv2dAdaptivePadding`` does, whatever ``padding`` says.
        output_padding: Pixels added after a transposed convolution's output.
        device: Device of the block's tensors, as in ``nn.Conv2d``.
        dtype: Precision of the block's parameters and statistics.
    """

    if TYPE_CHECKING:
        reparam_conv: _ConvNd  # once merged
        in_channels: int
        out_channels: int
        kernel_size: IntPair
        groups: int
        stride: IntPair
        padding: Union[str, IntPair]
        dilation: IntPair
        padding_mode: str
        output_padding: IntPair

    #: Smallest and largest kernel (longer side, in taps) that a config turns
    #: into a block, unless the config says otherwise. As in the DBB paper's
    #: code, 1x1 convolutions and stems with kernels from 7 on stay plain.
    kernel_sizes: Tuple[int, float] = (2, 6)

    #: Whether the merged convolution has a bias even with ``bias=False``, to
    #: hold the shift of the block's norms.
    _has_shift = True

    #: Number of dimensions of the images. A block for pictures has forms for
    #: the others: subclasses that change this, or ``transposed``.
    dims = 2
    transposed = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Union[int, IntPair],
        stride: Union[int, IntPair] = 1,
        padding: Union[int, str, IntPair] = 0,
        dilation: Union[int, IntPair] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = 'zeros',
        deploy: bool = False,
        init_cfg: Union[dict, list, None] = None,
        adaptive_padding: bool = False,
        output_padding: Union[int, IntPair] = 0,
        device: Union[str, torch.device, None] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        self.init_cfg = copy.deepcopy(init_cfg)
        #: Whether ``init_weights`` was called; mmengine reads this.
        self.is_init = False
        #: Whether the pads follow from the image, also where a stride of 1
        #: makes them the same for all images.
        self.adaptive_padding = adaptive_padding or padding == 'adaptive'
        self._refuse_other_dims(kernel_size)
        self.spec = ConvSpec(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            'adaptive' if self.adaptive_padding else padding,
            dilation,
            groups,
            padding_mode,
            self.dims,
            self.transposed,
            output_padding,
        )
        self._initializing = False
        self._cached_kernel: Optional[Any] = None
        self._wants_bias = bias
        if deploy:
            self.reparam_conv = plain_conv(
                self.spec, bias=bias or self._has_shift
            )

    in_channels = _geometry('in_channels', fixed=True)
    out_channels = _geometry('out_channels', fixed=True)
    kernel_size = _geometry('kernel_size', fixed=True)
    groups = _geometry('groups', fixed=True)
    stride = _geometry('stride')
    padding = _geometry('padding')
    dilation = _geometry('dilation')
    padding_mode = _geometry('padding_mode')
    output_padding = _geometry('output_padding')

    def _refuse_other_dims(self, kernel_size: Union[int, IntPair]) -> None:
        """Say which form of the block a kernel of other dimensions needs."""
        given: Any = kernel_size
        if isinstance(given, (tuple, list)) and len(given) in (1, 2, 3):
            if len(given) != self.dims:
                kind = LayerKind(len(given), self.transposed)
                raise ValueError(
                    f'kernel_size must be {self.dims} numbers or one, got '
                    f'{kernel_size!r}: a {type(self).__name__} stands for an '
                    f'{LayerKind(self.dims, self.transposed).name}, not for '
                    f'an {kind.name}{_hint(type(self), kind)}'
                )

    def set_spec(self, spec: ConvSpec) -> None:
        """Change the geometry of a built block.

        OpenMMLab's networks do so to dilate a backbone. Setting ``stride``,
        ``padding``, ``dilation`` or ``padding_mode`` comes here too.

        Args:
            spec: The new geometry, with the same channels, kernel size and
                groups.

        Raises:
            ValueError: If a branch does not support this geometry.
        """
        self.spec = spec
        if not self.deploy:
            return
        conv = self.reparam_conv
        take_geometry(conv, spec.conv_args)
        if spec.padding == 'adaptive' and not isinstance(conv, AdaptiveConv2d):
            conv.__class__ = AdaptiveConv2d

    def at_size_of(self, x: Tensor) -> ReparamConv2d:
        """The block with the geometry that it has for images of one size.

        Args:
            x: The images.

        Returns:
            ReparamConv2d: The block itself, unless its padding is adaptive.
            Then a twin that shares all tensors, see
            :func:`mmdbb.modules.shadow`.
        """
        spec = self.spec
        return self._with_spec(
            spec.at_size(tuple(map(int, x.shape[-spec.dims :])))
        )

    def _with_spec(self, spec: ConvSpec) -> ReparamConv2d:
        """The block with the geometry for images of one size, or itself."""
        if spec is self.spec:
            return self
        twin = shadow(self, lambda owner, name, tensor: tensor)
        twin.spec = spec
        twin._take_size(spec)
        # Verification puts another method of the block there.
        method = vars(self).get('forward_train')
        if isinstance(method, MethodType):
            like: Any = twin
            like.forward_train = MethodType(method.__func__, twin)
        return twin

    def _take_size(self, spec: ConvSpec) -> None:
        """Hand on the geometry for images of one size to what is inside."""

    @property
    def deploy(self) -> bool:
        """Whether the block is merged."""
        return 'reparam_conv' in self._modules

    def forward(
        self,
        input: Tensor,  # noqa: A002, the name that torch's layers have
        output_size: Optional[Sequence[int]] = None,
    ) -> Tensor:
        """Convolve images.

        Args:
            input: Images of shape (N, in, H, W), or one image (in, H, W);
                (N, in, T, H, W) for a block of three dimensions.
            output_size: Size of a transposed convolution's output, as in
                ``nn.ConvTranspose2d``: (H', W'), or the whole shape.

        Returns:
            Tensor: Shape (N, out, H', W') or (out, H', W').

        Raises:
            TypeError: If torch.fx traces the block alone.
            ValueError: If ``input`` has another number of dimensions.
        """
        x = input
        sized = () if output_size is None else (output_size,)
        if self.deploy:
            return self.reparam_conv(x, *sized)
        if isinstance(x, torch.fx.Proxy):
            return self._as_leaf(x, *sized)
        shape, spec = tuple(x.shape), self.spec
        channels = spec.in_channels
        is_image = len(shape) == spec.dims + 1 and shape[0] == channels
        if not (is_image or len(shape) == spec.dims + 2):
            sizes = ', '.join('THW'[-spec.dims :] if spec.dims > 1 else 'L')
            raise ValueError(
                f'{type(self).__name__} takes images of shape (N, C, {sizes})'
                f' or (C, {sizes}) with C={channels}, got {shape}: it stands '
                f'for an {spec.kind.name}'
            )
        if output_size is None:
            block = self.at_size_of(x)
        elif not spec.transposed:
            raise TypeError(
                f'{type(self).__name__} stands for an {spec.kind.name}, which '
                f'takes no output_size, got {output_size!r}'
            )
        else:
            size = tuple(map(int, x.shape[-spec.dims :]))
            wanted = tuple(map(int, output_size[-spec.dims :]))
            block = self._with_spec(spec.for_output(size, wanted))
        y = block.forward_train(x[None] if is_image else x)
        if block is not self:
            self._cached_kernel = block._cached_kernel
        return y[0] if is_image else y

    def _as_leaf(self, x: torch.fx.Proxy, *sized) -> torch.fx.Proxy:
        """Be a leaf of a graph that torch.fx traces, as an nn.Conv2d is.

        What a block computes depends on its mode and on the batch, so no
        graph of it would be right; the graph calls the block itself.

        Raises:
            TypeError: If the block is all that is traced.
        """
        tracer: Any = x.tracer
        name = tracer.path_of_module(self)
        if not name:
            raise TypeError(
                f'torch.fx would trace through a {type(self).__name__}, but '
                'a block can only be a leaf of the graph: trace a module '
                'that holds it, such as nn.Sequential(block)'
            )
        return tracer.create_proxy('call_module', name, (x, *sized), {})

    def _conv_forward(
        self, x: Tensor, weight: Tensor, bias: Optional[Tensor]
    ) -> Tensor:
        """Convolve with other weights, as OpenMMLab's hosts ask nn.Conv2d."""
        return convolve(x, weight, bias, self.spec)

    def __getattr__(self, name: str):
        own = vars(self).get('_parameters', {})
        if name in ('weight', 'bias') and own.get(name) is None:
            return equivalent(self, name)
        return super().__getattr__(name)

    @property
    def own_bias(self) -> Optional[Tensor]:
        """The parameter ``bias``, (out,); None without one, and once merged.

        It is not the equivalent bias where norms add theirs.
        """
        return vars(self).get('bias', self._parameters.get('bias'))

    @property
    def merges_with_bias(self) -> bool:
        """Whether the merged convolution has a bias."""
        own = self.reparam_conv.bias if self.deploy else self.own_bias
        return self._has_shift or own is not None

    @property
    def adds_bias(self) -> bool:
        """Whether merging gives a bias to a convolution built without one."""
        return self.merges_with_bias and not self._wants_bias

    def _add_own_bias(self, wanted: bool) -> None:
        bias = nn.Parameter(torch.zeros(self.out_channels)) if wanted else None
        self._parameters['bias'] = bias

    def __setattr__(self, name: str, value) -> None:
        # As an attribute a plain tensor would hide the equivalent weight.
        if name == 'weight' and isinstance(value, Tensor):
            self.register_parameter(name, value)
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param) -> None:
        """Register a parameter, but none that would be without effect.

        A parameter of this name may be replaced, as FSDP does.

        Raises:
            ValueError: If the name is ``weight`` or ``bias``, and the block
                has no such parameter.
        """
        computed = name in ('weight', 'bias') and not any(
            own.get(name) is not None for own in (self._parameters, vars(self))
        )
        if computed and vars(self).get('_is_built'):
            raise ValueError(
                f'{name} of a {type(self).__name__} is computed from its '
                'branches and cannot be set: set their parameters, or merge '
                'first: mmdbb.reparameterize(model)'
            )
        super().register_parameter(name, param)

    def forward_train(self, x: Tensor) -> Tensor:
        """Compute the block before merging, in training and in eval mode.

        Args:
            x: Images of shape (N, in, H, W).

        Returns:
            Tensor: Shape (N, out, H', W').
        """
        raise NotImplementedError

    def forward_branches(self, x: Tensor) -> Tensor:
        """Compute each branch by itself: the reference for verification.

        A block that is no sum has no other way than :meth:`forward_train`.

        Args:
            x: Images of shape (N, in, H, W).

        Returns:
            Tensor: The output of :meth:`forward_train`, up to rounding.
        """
        # The class's own: `literal_forward` puts this method in its place.
        return type(self).forward_train(self.at_size_of(x), x)

    def get_equivalent_kernel_bias(self) -> KernelBias:
        """Merge the block, as it is in eval mode, into kernel and bias.

        Returns:
            KernelBias: Kernel (out, in / groups, kH, kW) and bias (out,),
            differentiable in the block's parameters. Of a transposed block,
            the weight as torch has it, (in, out / groups, kH, kW).

        Raises:
            ValueError: If a hook inside the block may change its output.
        """
        if self.deploy:
            kernel, bias = self.reparam_conv.weight, self.reparam_conv.bias
            if bias is None:
                bias = kernel.new_zeros(self.out_channels)
            return KernelBias(kernel, bias)
        tensor = next(tensors_of(self), None)
        device = torch.device('meta') if tensor is None else tensor.device
        with fresh_weights(self), without_autocast(device):
            return self.in_torchs_layout(self._compose())

    def in_torchs_layout(self, conv: KernelBias) -> KernelBias:
        """Order a kernel's channels as torch's layer has them, and back.

        Args:
            conv: Kernel (out, in / groups, kH, kW) and bias (out,). If the
                block is transposed, the result has (in, out / groups, kH, kW),
                and the other way round; else it is ``conv``.
        """
        if not self.transposed:
            return conv
        kernel = swap_channels(conv.kernel, self.groups)
        return KernelBias(kernel, conv.bias)

    def _compose(self) -> KernelBias:
        raise NotImplementedError

    @classmethod
    def starts_plain(cls, kernel_size: IntPair) -> bool:
        """Whether a block of this size can start as any plain convolution.

        Args:
            kernel_size: Height and width in taps.
        """
        return True

    @torch.no_grad()
    def to_conv(self, dtype: torch.dtype = torch.float64) -> _ConvNd:
        """Make the plain convolution that equals the block in eval mode.

        It has the block's dtype, device and mode, and its parameters require
        gradients. It has a bias, except for a block with a composed kernel
        and ``bias=False``: no norm gives that one a shift.

        Args:
            dtype: Precision in which the kernel is composed,
                ``torch.float64`` or ``torch.float32``.

        Returns:
            nn.Module: The merged convolution, an ``nn.Conv2d`` or torch's
            layer of another kind that the block stands for.

        Raises:
            ValueError: If the kernel or the bias is not finite, or ``dtype``
                is another precision.
        """
        if dtype not in COMPOSED_IN:
            raise ValueError(
                f'dtype must be one of {COMPOSED_IN}, got {dtype!r}'
            )
        device = next(tensors_of(self)).device
        own_dtype = leaf_dtype(self)
        # Apple's GPUs have no float64.
        work = 'cpu' if device.type == 'mps' else device
        composed = cast(self, work, dtype).get_equivalent_kernel_bias()
        has_bias = self.merges_with_bias
        conv = plain_conv(self.spec, bias=has_bias, device='meta')
        layout = memory_format_of(self)
        names = ('weight', 'bias') if has_bias else ('weight',)
        if not has_bias and not composed.bias.is_meta and composed.bias.any():
            raise ValueError(
                f'{type(self).__name__} composes a bias, but says by '
                '_has_shift that without bias=True it has none'
            )
        for name, value in zip(names, composed):
            # A merged block returns its own parameters, so copy.
            value = value.to(
                device,
                own_dtype,
                copy=True,
                memory_format=(
                    layout if value.dim() > 1 else torch.contiguous_format
                ),
            )
            # The sum is finite exactly if all terms are: in double precision
            # it cannot overflow. Testing each number would cost far more.
            if not (
                value.is_meta
                or value.cpu().sum(dtype=torch.float64).isfinite()
            ):
                raise ValueError(
                    'the merged kernel is not finite: a parameter or a '
                    'running statistic of the block is NaN, infinite, or a '
                    'variance is negative'
                )
            setattr(conv, name, nn.Parameter(value))
        return conv.train(self.training)

    def switch_to_deploy(self) -> None:
        """Replace all branches by the merged convolution. Idempotent."""
        if self.deploy:
            return
        conv = self.to_conv()
        for name in list(self._modules):
            delattr(self, name)
        for name in list(self._parameters):
            delattr(self, name)
        self.reparam_conv = conv

    def convert_to_deploy(self) -> None:
        """:meth:`switch_to_deploy`, by another name of the field."""
        self.switch_to_deploy()

    def fuse(self) -> _ConvNd:
        """Merge in place, and return the convolution.

        As in timm, whose ``reparameterize_model`` puts what ``fuse()``
        returns in the module's place.
        """
        self.switch_to_deploy()
        return self.reparam_conv

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse ``torch.jit.script``, which knows only a part of Python.

        Raises:
            ValueError: Always, because torch would put what this returns
                into the caller's model.
        """
        raise ValueError(
            f'torch.jit.script compiles no block, got {type(self).__name__}: '
            'give it mmdbb.reparameterize(model), or use torch.jit.trace'
        )

    def reset_parameters(self) -> None:
        """Give all tensors the start that they had when the block was built.

        For blocks that were built on the device ``meta`` and moved by
        ``to_empty``. Where all modules of a network are reset one by one,
        reset a block after the layers inside it, as ``model.apply`` does.
        """
        reset_children_(self)
        if self.own_bias is not None:
            nn.init.zeros_(self.own_bias)
        if not self.deploy:
            self._apply_init_cfg()

    def init_weights(self) -> None:
        """Apply the block's own ``init_cfg`` again, if it has one.

        mmengine calls this method of every layer that has it.
        """
        self._apply_init_cfg()
        children: Iterator[Any] = self.children()
        for child in children:
            if hasattr(child, 'init_weights'):
                child.init_weights()
        self.is_init = True

    def _apply_init_cfg(self) -> None:
        # Called by constructors: many containers never call init_weights.
        if self.init_cfg:
            with self._own_rules():
                PORTS.initialize(self, self.init_cfg)

    @contextlib.contextmanager
    def _own_rules(self) -> Iterator[None]:
        self._initializing = True
        try:
            yield
        finally:
            self._initializing = False

    def apply(self, fn: Callable[[nn.Module], None]) -> ReparamConv2d:
        """Apply a function to all submodules, but not mmengine's init rules.

        mmengine matches its rules to layers by class name, at any depth. A
        rule such as "every norm's weight is 1" would undo the gammas with
        which a block starts, so such rules stop here. Those that a network
        has for this layer by its name are heard, see
        :func:`~mmdbb.blocks.equivalent.settable`.

        Args:
            fn: The function, which gets each module.
        """
        if not self._initializing and PORTS.is_host_rule(fn):
            if is_settable(self):
                fn(self)
            return self
        return super().apply(fn)

    def __getstate__(self) -> dict:
        # Copies and pickles do not take the cached kernel along.
        return dict(self.__dict__, _cached_kernel=None)

    def named_children(self) -> Iterator[Tuple[str, nn.Module]]:
        """Iterate over the direct children, by name.

        Raises:
            ValueError: If the caller is mmcv's ``fuse_conv_bn``. It knows no
                blocks, so it would fuse the norm behind this block into a
                convolution before it.
        """
        if not self.deploy:
            PORTS.refuse_fusion(self, sys._getframe(1))
        return super().named_children()

    def extra_repr(self) -> str:
        spec = self.spec
        text = (
            f'{spec.in_channels}, {spec.out_channels}, '
            f'kernel_size={spec.kernel_size}, stride={spec.stride}'
        )
        none, one = (0,) * spec.dims, (1,) * spec.dims
        defaults = dict(
            padding=none,
            output_padding=none,
            dilation=one,
            groups=1,
            padding_mode='zeros',
        )
        for name, default in defaults.items():
            if getattr(spec, name) != default:
                text += f', {name}={getattr(spec, name)}'
        return text


class HasDeploy(Protocol):
    """A block, or whatever else knows whether it is merged."""

    @property
    def deploy(self) -> bool:
        """Whether it is merged."""


def _hint(block: type, kind: LayerKind) -> str:
    """Name the form of a block that stands for another layer, if any."""
    for name, form in BLOCKS.module_dict.items():
        own = LayerKind(form.dims, form.transposed)
        if issubclass(form, block) and own == kind:
            return f', as {name} does'
    return ''


def refuse_merged(block: HasDeploy, missing: str) -> None:
    """Raise a ValueError if a block is merged.

    Args:
        block: The block.
        missing: What a merged block lacks, for the message.
    """
    if block.deploy:
        raise ValueError(
            f'{type(block).__name__} is merged: it has no {missing}'
        )
