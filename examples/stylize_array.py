"""Stylize one picture from Python: no video, no session."""

import sys

import cv2
import numpy as np

from models.load import load
from models.params import Params, Style

if len(sys.argv) != 3:
    sys.exit("usage: python examples/stylize_array.py photo.jpg painted.png")
photo = cv2.cvtColor(cv2.imread(sys.argv[1]), cv2.COLOR_BGR2RGB)
photo = cv2.resize(photo, (512, 288), interpolation=cv2.INTER_AREA)

stylizer = load("mini", (512, 288), log=print)
params = Params(style=Style(prompt="watercolour and ink", seed=3))
painted = stylizer.step(stylizer.open(params), np.ascontiguousarray(photo), params).image()
cv2.imwrite(sys.argv[2], cv2.cvtColor(painted, cv2.COLOR_RGB2BGR))
