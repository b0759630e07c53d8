from .budget import GreedySelection as GreedySelection
from .budget import Selection as Selection
from .budget import greedy as greedy
from .budget import pareto_front as pareto_front
from .budget import select as select
from .contribution import Contributions as Contributions
from .contribution import contributions as contributions
