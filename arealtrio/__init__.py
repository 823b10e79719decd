"""arealtrio: the rollout half of asynchronous RL for language models."""

from .config import RolloutConfig
from .controller import RolloutController
from .engine import RemoteEngine, open_engine
from .errors import (
    ArealTrioError,
    ConfigError,
    ConnectFailed,
    DeadlineExceeded,
    InvalidRequest,
    NoServerAvailable,
    ProtocolError,
    RequestRejected,
    ResponseTooLarge,
    RolloutClosed,
    RolloutCrashed,
    RolloutError,
    ServerError,
    StalenessBudgetExhausted,
    TooManyFailures,
    TooStale,
    TransportError,
    TransportTimeout,
    UsageError,
    WeightUpdateError,
    WorkflowError,
)
from .executor import WorkflowExecutor, open_executor
from .group_policy import GroupPolicy
from .scheduling import (
    LeastRequestPolicy,
    LeastRequestPrioritySchedulePolicy,
    RoundRobinPolicy,
    RoundRobinSchedulePolicy,
    SchedulePolicy,
)
from .settlement import Failure, RolloutResult
from .staleness import Permit, RolloutStat, StalenessManager
from .trajectory import Batch, CollateBuffers, Group
from .types import (
    FailureKind,
    GenerationHyperparameters,
    ModelRequest,
    ModelResponse,
    Outcome,
    Segment,
    Trajectory,
)
from .weights import WeightUpdate, WeightUpdateResult
from .workflow import MultiTurnWorkflow, RLVRWorkflow, RolloutWorkflow, SingleTurnWorkflow

__all__ = [
    "ArealTrioError",
    "Batch",
    "CollateBuffers",
    "ConfigError",
    "ConnectFailed",
    "DeadlineExceeded",
    "Failure",
    "FailureKind",
    "GenerationHyperparameters",
    "Group",
    "GroupPolicy",
    "InvalidRequest",
    "LeastRequestPolicy",
    "LeastRequestPrioritySchedulePolicy",
    "ModelRequest",
    "ModelResponse",
    "MultiTurnWorkflow",
    "NoServerAvailable",
    "Outcome",
    "Permit",
    "ProtocolError",
    "RLVRWorkflow",
    "RemoteEngine",
    "RequestRejected",
    "ResponseTooLarge",
    "RolloutClosed",
    "RolloutConfig",
    "RolloutController",
    "RolloutCrashed",
    "RolloutError",
    "RolloutResult",
    "RolloutStat",
    "RolloutWorkflow",
    "RoundRobinPolicy",
    "RoundRobinSchedulePolicy",
    "SchedulePolicy",
    "Segment",
    "ServerError",
    "SingleTurnWorkflow",
    "StalenessBudgetExhausted",
    "StalenessManager",
    "TooManyFailures",
    "TooStale",
    "Trajectory",
    "TransportError",
    "TransportTimeout",
    "UsageError",
    "WeightUpdate",
    "WeightUpdateError",
    "WeightUpdateResult",
    "WorkflowError",
    "WorkflowExecutor",
    "open_engine",
    "open_executor",
]
