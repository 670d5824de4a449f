"""The names of `ant_lightning`, for type checkers; `__init__.py` reads them from here."""

from ant_lightning.affinity.callback import (
    TaskAffinity as TaskAffinity,
)
from ant_lightning.affinity.clustering import (
    GradientClustering as GradientClustering,
    spread_affinity as spread_affinity,
)
from ant_lightning.affinity.distance import (
    affinity_by_distance as affinity_by_distance,
    distance_correlation as distance_correlation,
)
from ant_lightning.affinity.estimate import (
    corrected_affinity as corrected_affinity,
    plain_affinity as plain_affinity,
    split_half_reliability as split_half_reliability,
)
from ant_lightning.affinity.measure import (
    task_affinity as task_affinity,
    timestep_grid as timestep_grid,
)
from ant_lightning.affinity.reclustering import (
    Reclustering as Reclustering,
)
from ant_lightning.affinity.result import (
    AffinityResult as AffinityResult,
)
from ant_lightning.backbones.diffusers import (
    DiffusersBackbone as DiffusersBackbone,
)
from ant_lightning.backbones.dit import (
    DiT as DiT,
)
from ant_lightning.backbones.official_checkpoints import (
    load_official_checkpoint as load_official_checkpoint,
)
from ant_lightning.backbones.presets import (
    adm_imagenet64 as adm_imagenet64,
    adm_imagenet256 as adm_imagenet256,
    adm_p2_light as adm_p2_light,
    dit_b_2 as dit_b_2,
    dit_b_4 as dit_b_4,
    dit_b_8 as dit_b_8,
    dit_l_2 as dit_l_2,
    dit_l_4 as dit_l_4,
    dit_l_8 as dit_l_8,
    dit_s_2 as dit_s_2,
    dit_s_4 as dit_s_4,
    dit_s_8 as dit_s_8,
    dit_xl_2 as dit_xl_2,
    dit_xl_4 as dit_xl_4,
    dit_xl_8 as dit_xl_8,
    ldm_cin256 as ldm_cin256,
    ldm_ffhq256 as ldm_ffhq256,
)
from ant_lightning.backbones.routing import (
    ChannelRouting as ChannelRouting,
)
from ant_lightning.backbones.unet import (
    UNet as UNet,
)
from ant_lightning.balancing.backward import (
    BackwardReport as BackwardReport,
    task_gradients as task_gradients,
)
from ant_lightning.balancing.base import (
    Balancer as Balancer,
    GradientBalancer as GradientBalancer,
    LossBalancer as LossBalancer,
    SampleBalancer as SampleBalancer,
)
from ant_lightning.balancing.continuous_uncertainty import (
    ContinuousUncertainty as ContinuousUncertainty,
)
from ant_lightning.balancing.famo import (
    FAMO as FAMO,
)
from ant_lightning.balancing.gls import (
    GLS as GLS,
)
from ant_lightning.balancing.gradnorm import (
    GradNorm as GradNorm,
)
from ant_lightning.balancing.gradvac import (
    GradVac as GradVac,
    gradvac_weights as gradvac_weights,
)
from ant_lightning.balancing.history import (
    DWA as DWA,
    RLW as RLW,
)
from ant_lightning.balancing.imtl import (
    IMTLL as IMTLL,
)
from ant_lightning.balancing.linear import (
    LinearScalarization as LinearScalarization,
)
from ant_lightning.balancing.nash import (
    NashMTL as NashMTL,
    nash_weights as nash_weights,
)
from ant_lightning.balancing.one_call import (
    multitask_backward as multitask_backward,
)
from ant_lightning.balancing.pcgrad import (
    PCGrad as PCGrad,
    pcgrad_weights as pcgrad_weights,
)
from ant_lightning.balancing.stch import (
    STCH as STCH,
)
from ant_lightning.balancing.step import (
    MultiTaskStep as MultiTaskStep,
)
from ant_lightning.balancing.torchjd import (
    TorchJDBalancer as TorchJDBalancer,
)
from ant_lightning.balancing.uncertainty import (
    UncertaintyWeighting as UncertaintyWeighting,
)
from ant_lightning.callbacks.conflict import (
    ConflictMonitor as ConflictMonitor,
)
from ant_lightning.callbacks.cost import (
    StepCost as StepCost,
)
from ant_lightning.callbacks.dashboard import (
    Dashboard as Dashboard,
)
from ant_lightning.callbacks.ema import (
    EMA as EMA,
    averaged_weights as averaged_weights,
)
from ant_lightning.callbacks.excess_risk import (
    ExcessRisk as ExcessRisk,
)
from ant_lightning.callbacks.progress import (
    TrainingProgress as TrainingProgress,
)
from ant_lightning.callbacks.sample_grid import (
    SampleGrid as SampleGrid,
)
from ant_lightning.callbacks.sample_writer import (
    SampleWriter as SampleWriter,
)
from ant_lightning.cli.export import (
    export as export,
)
from ant_lightning.cli.load_run import (
    load_run as load_run,
)
from ant_lightning.data.archives.edm_images import (
    EDMImages as EDMImages,
)
from ant_lightning.data.archives.stream import (
    StreamData as StreamData,
)
from ant_lightning.data.archives.tar import (
    TarShards as TarShards,
)
from ant_lightning.data.batch import (
    Batch as Batch,
)
from ant_lightning.data.dataset import (
    ImageDataset as ImageDataset,
    TensorImages as TensorImages,
)
from ant_lightning.data.digits import (
    DigitsData as DigitsData,
)
from ant_lightning.data.digits_mixture import (
    DigitsMixtureData as DigitsMixtureData,
)
from ant_lightning.data.hugging_face import (
    HuggingFaceDataset as HuggingFaceDataset,
)
from ant_lightning.data.image_folder import (
    ImageFolderData as ImageFolderData,
)
from ant_lightning.data.latents.cached import (
    LatentsData as LatentsData,
)
from ant_lightning.data.latents.lightning_dit import (
    LightningDiTLatentsData as LightningDiTLatentsData,
)
from ant_lightning.data.latents.space import (
    LatentSpace as LatentSpace,
)
from ant_lightning.data.latents.stored_moments import (
    EDM2LatentsData as EDM2LatentsData,
    REPALatentsData as REPALatentsData,
)
from ant_lightning.data.latents.writer import (
    LatentWriter as LatentWriter,
)
from ant_lightning.data.map_style import (
    MapStyleData as MapStyleData,
)
from ant_lightning.data.module import (
    ImageDataModule as ImageDataModule,
)
from ant_lightning.data.shapes import (
    ShapesData as ShapesData,
)
from ant_lightning.data.stored_images import (
    StoredImages as StoredImages,
)
from ant_lightning.data.text.cache import (
    TextWriter as TextWriter,
)
from ant_lightning.data.text.encoder import (
    TextEncoder as TextEncoder,
)
from ant_lightning.data.text.folder import (
    CaptionFolderData as CaptionFolderData,
)
from ant_lightning.diagnosis.callback import (
    Diagnosis as Diagnosis,
)
from ant_lightning.diffusion.density import (
    Density as Density,
    Table as Table,
    Uniform as Uniform,
)
from ant_lightning.diffusion.density_normal import (
    LogitNormal as LogitNormal,
    LogNormal as LogNormal,
)
from ant_lightning.diffusion.density_shifted import (
    Mode as Mode,
    Shifted as Shifted,
    SizeShifted as SizeShifted,
)
from ant_lightning.diffusion.discrete import (
    DiscreteDiffusion as DiscreteDiffusion,
)
from ant_lightning.diffusion.edm import (
    EDM as EDM,
)
from ant_lightning.diffusion.flow import (
    FlowMatching as FlowMatching,
)
from ant_lightning.diffusion.guidance import (
    GuidedDenoiser as GuidedDenoiser,
)
from ant_lightning.diffusion.losses import (
    denoising_loss as denoising_loss,
    variational_bound as variational_bound,
)
from ant_lightning.diffusion.mixture import (
    GaussianMixture as GaussianMixture,
)
from ant_lightning.diffusion.preconditioning import (
    EDMPreconditioning as EDMPreconditioning,
    IDDPMPreconditioning as IDDPMPreconditioning,
    VEPreconditioning as VEPreconditioning,
    VPPreconditioning as VPPreconditioning,
)
from ant_lightning.diffusion.process import (
    NoiseProcess as NoiseProcess,
)
from ant_lightning.diffusion.proposals import (
    LossSecondMoment as LossSecondMoment,
    SpeeD as SpeeD,
)
from ant_lightning.diffusion.samplers.base import (
    Sampler as Sampler,
)
from ant_lightning.diffusion.samplers.ddim import (
    DDIM as DDIM,
    DDPM as DDPM,
)
from ant_lightning.diffusion.samplers.diffusers import (
    DiffusersSampler as DiffusersSampler,
)
from ant_lightning.diffusion.samplers.edm import (
    EDMSampler as EDMSampler,
)
from ant_lightning.diffusion.samplers.likelihood import (
    flow_log_likelihood as flow_log_likelihood,
)
from ant_lightning.diffusion.samplers.ode import (
    ODESampler as ODESampler,
)
from ant_lightning.diffusion.samplers.sde import (
    SDESampler as SDESampler,
)
from ant_lightning.diffusion.schedules import (
    CosineSchedule as CosineSchedule,
    LinearSchedule as LinearSchedule,
    NoiseSchedule as NoiseSchedule,
    ScaledLinearSchedule as ScaledLinearSchedule,
    TableSchedule as TableSchedule,
    ZeroTerminalSNR as ZeroTerminalSNR,
)
from ant_lightning.diffusion.stored_scheduler import (
    stored_process as stored_process,
)
from ant_lightning.diffusion.weighting import (
    P2 as P2,
    LossWeighting as LossWeighting,
    MinSNR as MinSNR,
)
from ant_lightning.errors import (
    ConfigError as ConfigError,
)
from ant_lightning.exports.adapter_files import (
    save_adapter as save_adapter,
)
from ant_lightning.generation.callback import (
    GenerationMetrics as GenerationMetrics,
)
from ant_lightning.generation.clip_score import (
    CaptionScore as CaptionScore,
)
from ant_lightning.generation.extractor import (
    FeatureExtractor as FeatureExtractor,
    Features as Features,
    ModuleFeatures as ModuleFeatures,
)
from ant_lightning.generation.features import (
    ImageFeatures as ImageFeatures,
)
from ant_lightning.generation.frechet import (
    GaussianStatistics as GaussianStatistics,
    frechet_distance as frechet_distance,
)
from ant_lightning.generation.inception import (
    InceptionFeatures as InceptionFeatures,
)
from ant_lightning.generation.inception_score import (
    inception_score as inception_score,
)
from ant_lightning.generation.kid import (
    kernel_distance as kernel_distance,
)
from ant_lightning.generation.neighbours import (
    nearest_distance as nearest_distance,
    precision_recall as precision_recall,
)
from ant_lightning.generation.scores import (
    GenerationScores as GenerationScores,
)
from ant_lightning.generation.shipped_networks import (
    DigitsFeatures as DigitsFeatures,
    ShapesFeatures as ShapesFeatures,
)
from ant_lightning.generation.statistics import (
    ImageStatistics as ImageStatistics,
)
from ant_lightning.generation.transformers_features import (
    CLIPFeatures as CLIPFeatures,
    DINOv2Features as DINOv2Features,
)
from ant_lightning.models.adapters import (
    Adapter as Adapter,
    LoRA as LoRA,
    PeftAdapter as PeftAdapter,
)
from ant_lightning.models.autoencoder import (
    AutoencoderModule as AutoencoderModule,
)
from ant_lightning.models.auxiliary import (
    FeatureAlignment as FeatureAlignment,
)
from ant_lightning.models.first_stage.first_stage import (
    FirstStage as FirstStage,
)
from ant_lightning.models.learning_rate import (
    InverseSqrtLR as InverseSqrtLR,
)
from ant_lightning.models.module import (
    MultiTaskDiffusion as MultiTaskDiffusion,
)
from ant_lightning.models.muon import (
    MuonAdamW as MuonAdamW,
)
from ant_lightning.models.paper_modules import (
    ADMModule as ADMModule,
    DiTModule as DiTModule,
    LDMModule as LDMModule,
)
from ant_lightning.models.parameter_groups import (
    MuonGroups as MuonGroups,
    NamedGroups as NamedGroups,
)
from ant_lightning.models.settings import (
    Optimization as Optimization,
    Sampling as Sampling,
    Tasks as Tasks,
    TimestepSampling as TimestepSampling,
)
from ant_lightning.runtime.checkpoints import (
    Checkpoints as Checkpoints,
)
from ant_lightning.runtime.sharded_strategy import (
    ShardedStrategy as ShardedStrategy,
)
from ant_lightning.tasks.clusterings import (
    Clustering as Clustering,
    FixedClustering as FixedClustering,
    SNRClustering as SNRClustering,
    TimestepClustering as TimestepClustering,
)
from ant_lightning.tasks.clusters import (
    TimestepClusters as TimestepClusters,
)
from ant_lightning.tasks.costs import (
    affinity_costs as affinity_costs,
    snr_costs as snr_costs,
    timestep_costs as timestep_costs,
)
from ant_lightning.tasks.partition import (
    partition as partition,
)
from ant_lightning.tasks.shuffled import (
    ShuffledClustering as ShuffledClustering,
)
from ant_lightning.transfer.callback import (
    NegativeTransferGap as NegativeTransferGap,
)
from ant_lightning.transfer.expert_callback import (
    ExpertComparison as ExpertComparison,
)
from ant_lightning.transfer.experts import (
    IntervalExperts as IntervalExperts,
    merged_weights as merged_weights,
    with_experts as with_experts,
)
from ant_lightning.transfer.gap import (
    negative_transfer_gap as negative_transfer_gap,
)
from ant_lightning.transfer.matrix import (
    transfer_matrix as transfer_matrix,
)
from ant_lightning.transfer.matrix_callback import (
    TransferMatrix as TransferMatrix,
)
from ant_lightning.transfer.result import (
    TransferGapResult as TransferGapResult,
)

__version__: str
__all__: list[str]
