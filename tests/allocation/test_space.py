"""Candidates within a budget: against all combinations."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from liar_ext import InputError
from liar_ext.allocation import Budget
from liar_ext.allocation.levels import choose
from liar_ext.allocation.search import Problem
from liar_ext.allocation.space import Space
from tests_allocation_problems import Priced, full, problem
