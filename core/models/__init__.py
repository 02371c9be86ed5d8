"""Networks that no library has, as diffusers models: one file a network."""

from diffusers.utils import import_utils

# diffusers imports xformers wherever it is installed, which prints a page of warnings when its kernels were built for
# another torch. Nothing here uses it through diffusers: `core.attention` imports it when a recipe asks for it.
import_utils._xformers_available = False
