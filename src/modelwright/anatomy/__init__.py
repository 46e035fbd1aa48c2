"""Which tensor of a model does what: one file per model family, found by listing the files.

A family says in patterns which name is `attn.q`, `mlp.down`, `norm`, `embed` or `head`. Methods use these roles and
never a model's own names. `removal` takes blocks, neurons, heads, channels and experts out for good.

Roles: `attn.{q,k,v,o,qkv}`, `attn.cross_{q,k,v,o}`, `mlp.{gate,up,down,gate_up}`,
`experts.{gate,up,down,gate_up}`, `router`, `router.shared`, `embed`, `embed.{patch,type,class}`, `position`, `head`,
`head.{pool,transform}`, `norm`; in models without a family `linear`, `conv` and `parameter`.
"""

from ._base import Anatomy, Group, Part, Site, Span, Units
from ._find import anatomy_of, families, roles
from ._where import matches

__all__ = ["Anatomy", "Group", "Part", "Site", "Span", "Units", "anatomy_of", "families", "matches", "roles"]
