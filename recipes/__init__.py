"""The recipes, one file a family. Importing this package registers them all."""

from recipes import lvdm as lvdm
