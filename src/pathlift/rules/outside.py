"""Operators that are known to lie outside the theory, each with its reason and what to do instead."""

from __future__ import annotations

from pathlift.rules.base import outside

outside(
    "it is neither a map with fixed slopes on both sides of 0 nor a clamp, so it has no path-lifting.",
    "Replace this activation by ReLU, leaky ReLU, PReLU, ReLU6 or another piecewise linear one.",
    "gelu silu sigmoid tanh elu celu selu softplus mish hardswish log_sigmoid logsigmoid softsign erf exp exp2 "
    "expm1 log log2 log10 log1p sin cos tan atan asin acos sinh cosh asinh acosh atanh sqrt rsqrt square pow "
    "reciprocal glu hardshrink softshrink sign sgn floor ceil round trunc frac fmod remainder erfc erfinv "
    "log_sigmoid_forward logit cumprod prod norm linalg_vector_norm frobenius_norm logsumexp logcumsumexp "
    "float_power hypot xlogy",
)
outside(
    "softmax normalises activations by each other, which no path-lifting covers.",
    "Let the model return logits: leave a final softmax to the loss. Attention is outside the theory.",
    "softmax _softmax log_softmax _log_softmax softmin scaled_dot_product_attention _native_multi_head_attention",
)
outside(
    "it normalises with statistics of the activations themselves.",
    "Only batch norm with frozen statistics (eval mode) is covered: replace it, or fold its statistics into constants.",
    "layer_norm native_layer_norm group_norm native_group_norm rms_norm _fused_rms_norm "
    "local_response_norm var std var_mean std_mean normalize cosine_similarity",
)
outside(
    "LP-pooling takes powers and roots of activations.",
    "Use max-pooling or average pooling.",
    "lp_pool1d lp_pool2d lp_pool3d",
)
outside(
    "it sorts or selects by the values of the activations.",
    "Only maxima and minima are covered.",
    "sort topk argsort argmax argmin kthvalue median nanmedian mode unique msort nonzero masked_select "
    "max_unpool2d max_unpool3d fractional_max_pool2d fractional_max_pool3d cummax cummin searchsorted "
    "bucketize",
)
outside(
    "it compares activations, which is not continuous.",
    "Use ReLU, torch.maximum or torch.clamp.",
    "gt ge lt le eq ne greater less greater_equal less_equal not_equal logical_and logical_or logical_not "
    "logical_xor isnan isinf isfinite heaviside bitwise_not bitwise_and bitwise_or any all equal allclose "
    "isclose",
)
outside(
    "it samples the input at positions that are computed on the way.",
    "Use torch.nn.functional.interpolate with a fixed size.",
    "affine_grid_generator deform_conv2d roi_align roi_pool",
)
outside(
    "its gates multiply activations.",
    "Only recurrent layers without gates, with ReLU, are covered: nn.RNN(nonlinearity='relu').",
    "lstm gru quantized_lstm quantized_gru lstm_cell gru_cell lstm_mps",
)
outside(
    "it applies tanh in every step, which is not piecewise linear.",
    "Use nonlinearity='relu'.",
    "rnn_tanh rnn_tanh_cell",
)
outside(
    "it fills the places of a mask in their order, one value after the other.",
    "Write it as an assignment to an index or as torch.where.",
    "masked_scatter",
)
outside(
    "it reads memory by strides, whatever shape the tensor has.",
    "Use views, slices and indices.",
    "as_strided as_strided_scatter as_strided_copy",
)
outside(
    "it multiplies or normalises activations by each other.",
    "Path-liftings need every product to have a parameter or a constant on one side.",
    "cdist renorm pairwise_distance pdist linalg_norm linalg_matrix_norm linalg_inv linalg_solve linalg_det logdet",
)
outside(
    "it takes the sign of an activation, which is not continuous.",
    "Use ReLU, abs, torch.maximum or torch.clamp.",
    "copysign signbit nextafter floor_divide",
)
outside(
    "it draws random numbers.",
    "Make the model deterministic in eval mode.",
    "bernoulli rand_like randn_like randint_like multinomial normal uniform poisson",
)
outside(
    "an embedding reads the input as integer indices, not as numbers.",
    "Feed the embedded vectors as the model's input.",
    "embedding embedding_bag one_hot",
)
