"""Plain attention with its log-sum-exp: the definition.

Every other implementation is tested against `reference`. A branch is attention
over some of the keys; `merge` joins branches into the one softmax over all of
them, with no approximation, because the softmax of a union is the average of
its parts weighted by their exponentiated lse.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

# The lse of a row without keys: finite, so that 0 * inf never arises.
EMPTY = -1e30

Out = tuple[Float[Array, "b q a d"], Float[Array, "b q a"]]


def reference(
  q: Float[Array, "b q a d"],
  k: Float[Array, "b k a d"],
  v: Float[Array, "b k a d"],
  mask: Bool[Array | np.ndarray, "... #q k"] | None = None,
) -> Out:
  """Softmax attention in float32, scaled by d^-1/2.

  Args:
    q: queries.
    k: keys.
    v: values.
    mask: True where a query sees a key; [q k], [1 k] or broadcastable
      to [b a q k].

  Returns:
    (out, lse). A row that sees no key gives out 0 and lse EMPTY.
  """
  if not k.shape[1]:
    return jnp.zeros_like(q), jnp.full(q.shape[:3], EMPTY)
  logits = jnp.einsum(
    "bqad,bkad->baqk", q, k, preferred_element_type=jnp.float32
  )
  logits = logits * (q.shape[-1] ** -0.5)
  if mask is not None:
    logits = jnp.where(mask, logits, EMPTY)
  # The maximum only guards the exponent; its gradient cancels. Starting it
  # from EMPTY lets a branch have no keys at all.
  top = jnp.max(logits, -1, keepdims=True, initial=EMPTY)
  top = jax.lax.stop_gradient(top)
  weight = jnp.exp(logits - top)
  if mask is not None:
    weight = jnp.where(mask, weight, 0.0)
  total = jnp.sum(weight, -1, keepdims=True)
  some = total > 0
  safe = jnp.where(some, total, 1.0)
  lse = jnp.where(some, top + jnp.log(safe), EMPTY)[..., 0]
  out = jnp.einsum(
    "baqk,bkad->bqad",
    (weight / safe).astype(v.dtype),
    v,
    preferred_element_type=jnp.float32,
  )
  return out.astype(q.dtype), jnp.swapaxes(lse, 1, 2)


def merge(*branches: Out) -> Out:
  """One softmax over the union of the branches' (disjoint) keys."""
  outs, lses = zip(*branches, strict=True)
  lse = jnp.stack(lses)
  top = jax.lax.stop_gradient(jnp.max(lse, 0))
  weight = jnp.exp(lse - top)
  total = jnp.sum(weight, 0)
  share = (weight / total)[..., None]
  out = jnp.sum(share * jnp.stack(outs).astype(jnp.float32), 0)
  return out.astype(outs[0].dtype), top + jnp.log(total)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def without_gradient(lse: jax.Array, whose: str) -> jax.Array:
  """A log-sum-exp that must not be differentiated, and says so if it is.

  Raises:
    NotImplementedError: something took a gradient through it.
  """
  del whose
  return lse


def _lse_forward(lse, whose):
  del whose
  return lse.value, None


def _lse_backward(whose, residual, grad):
  del residual
  if not isinstance(grad, jax.custom_derivatives.SymbolicZero):
    raise NotImplementedError(
      f"{whose} has no gradient through its log-sum-exp: branches cannot be"
      " merged by it in training"
    )
  return (grad,)


without_gradient.defvjp(_lse_forward, _lse_backward, symbolic_zeros=True)
