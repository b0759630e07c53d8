from .architectures import architecture as architecture
from .architectures import list_architectures as list_architectures
from .architectures import shape as shape
from .blocks import activation as activation
from .spec import Spec as Spec
from .spec import build as build
from .spec import count_parameters as count_parameters
from .spec import fast_count as fast_count
