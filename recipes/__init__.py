"""The recipes, one file a family. Importing this package registers them all."""

from recipes import animatediff as animatediff
from recipes import first_stage as first_stage
from recipes import ldm as ldm
from recipes import lvdm as lvdm
