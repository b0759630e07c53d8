from .architectures import architecture as architecture
from .architectures import list_architectures as list_architectures
from .spec import Spec as Spec
from .spec import build as build
from .spec import count_parameters as count_parameters
