"""Groups of JAX primitives that behave alike for axis inference (jax 0.10 to 0.12 spellings)."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operands have the output's shape, size-1 dims, or rank 0.
ELEMENTWISE = _words("""
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
    bitcast_convert_type cbrt ceil clamp clz complex conj convert_element_type copy copy_p cos cosh
    digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac
    imag integer_pow is_finite le le_to lgamma log log1p log2 logistic lt lt_to max min mul mulhi ne
    neg polynomial
    nextafter not one_minus_square or polygamma population_count pow real reduce_precision
    regularized_incomplete_beta rem round rsqrt select_n shift_left shift_right_arithmetic
    shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta name
    random_fold_in random_seed sharding_constraint
""")
REDUCE_NOT_SUM = _words("""
    reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin reduce
""")
# Values along one axis depend on each other; the axis is in `axis`, `dimension` or `dimensions`.
ALONG_AXIS = _words("""
    sort cumsum cumprod cummax cummin cumlogsumexp top_k approx_top_k split unstack rev fft
""")
DRAWS = _words("random_bits random_split")  # draws whose shape is a parameter, not an operand's
RANDOM = DRAWS | _words("random_gamma rng_bit_generator")
RANDOM_KEYS = _words("random_wrap random_unwrap random_clone")
PASSTHROUGH = _words("optimization_barrier device_put")
SCATTER = _words("scatter scatter-add scatter_add scatter-mul scatter-min scatter-max scatter-sub")
WINDOW = _words("""
    reduce_window reduce_window_sum reduce_window_max reduce_window_min
    select_and_scatter_add select_and_gather_add
""")
BATCHED_MATRIX = _words("cholesky qr lu eigh svd triangular_solve householder_product")
CALLS = _words("""
    jit pjit closed_call core_call call remat remat2 checkpoint custom_jvp_call custom_vjp_call
    custom_vjp_call_jaxpr
""")


def body_of(params: dict) -> str:
    """The parameter of a call primitive that holds the program it calls."""
    return next(k for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in params)
