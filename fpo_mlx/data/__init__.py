"""Preference data: text to token pairs, their order, and checks. Numpy only, no model."""

from fpo_mlx.data.batches import batches as batches
from fpo_mlx.data.batches import batches_per_epoch as batches_per_epoch
from fpo_mlx.data.batches import epoch_batches as epoch_batches
from fpo_mlx.data.batches import micro_batches as micro_batches
from fpo_mlx.data.check import CheckReport as CheckReport
from fpo_mlx.data.check import check_data as check_data
from fpo_mlx.data.check import write_clean as write_clean
from fpo_mlx.data.passages import read_passages as read_passages
from fpo_mlx.data.passages import spread as spread
from fpo_mlx.data.read import AUTO_SPLITS as AUTO_SPLITS
from fpo_mlx.data.read import SPLITS as SPLITS
from fpo_mlx.data.read import HubSplits as HubSplits
from fpo_mlx.data.read import RawRow as RawRow
from fpo_mlx.data.read import find_splits as find_splits
from fpo_mlx.data.read import read_raw as read_raw
from fpo_mlx.data.read import read_split as read_split
from fpo_mlx.data.rows import DEFAULT_COLUMNS as DEFAULT_COLUMNS
from fpo_mlx.data.rows import Columns as Columns
from fpo_mlx.data.rows import PreferenceRow as PreferenceRow
from fpo_mlx.data.rows import parse_row as parse_row
from fpo_mlx.data.tokenize import TokenizedPairs as TokenizedPairs
from fpo_mlx.data.tokenize import TokenizeReport as TokenizeReport
from fpo_mlx.data.tokenize import data_fingerprint as data_fingerprint
from fpo_mlx.data.tokenize import pair_lengths as pair_lengths
from fpo_mlx.data.tokenize import tokenize_row as tokenize_row
from fpo_mlx.data.tokenize import tokenize_rows as tokenize_rows
