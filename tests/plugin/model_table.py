# SPDX-License-Identifier: Apache-2.0
"""Every model architecture that a tested SGLang has, judged: served, refused, or loaded in another way.

A row is an architecture and the `model_type` whose default configuration stands for it. Where the defaults are no
model, "+" adds the fields of `LLAMA`; "-", for a configuration that is code on the Hub, is "llama+".
"""

from __future__ import annotations

from typing import Any

# a configuration that is served; tests change what they are about
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}

WINDOWS = {"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"]}
LATENT = {"kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64}
QWEN3_5 = {"model_type": "qwen3_5_text", "full_attention_interval": 4}
KDA = {"kda_layers": [1], "full_attn_layers": [2]}
# with other query heads in layers with a sliding window: the last field lets SGLang ask transformers for one number
STEP = WINDOWS | {
    "num_hidden_layers": 2,
    "num_attention_heads": 64,
    "attention_other_setting": {"num_attention_heads": 96, "num_attention_groups": 8},
    "allow_global_per_layer_attribute_access": True,
}


def _rows(text: str) -> dict[str, str]:
    words = text.split()
    return dict(zip(words[::2], words[1::2], strict=True))


def _names(text: str) -> set[str]:
    return set(text.split())


SERVED = _rows(
    """
    AfmoeForCausalLM afmoe  ApertusForCausalLM apertus  ArceeForCausalLM arcee
    BailingMM2NativeForConditionalGeneration bailingmm_moe_v2_lite
    BailingMMNativeForConditionalGeneration bailingmm_moe_v2_lite
    BailingMoEForCausalLM -  BailingMoeForCausalLM -  BailingMoeV2ForCausalLM -
    ChatGLMModel chatglm  CohereForCausalLM cohere
    Cosmos3ForConditionalGeneration cosmos3_omni  Cosmos3EdgeForConditionalGeneration cosmos3_edge
    DbrxForCausalLM dbrx  DeciLMForCausalLM -  DeepseekForCausalLM -  DeepseekOCRForCausalLM deepseek-ocr
    DotsOCRForCausalLM dots_ocr
    Ernie4_5_ForCausalLM -  Ernie4_5_MoeForCausalLM ernie4_5_moe
    Ernie4_5_VLMoeForConditionalGeneration ernie4_5_vl_moe
    ExaoneForCausalLM exaone  GPT2LMHeadModel gpt2  GPTBigCodeForCausalLM gpt_bigcode  GPTJForCausalLM gptj
    GemmaForCausalLM gemma  Glm4ForCausalLM glm4  Glm4MoeForCausalLM glm4_moe
    Glm4vForConditionalGeneration glm4v  Glm4vMoeForConditionalGeneration glm4v_moe
    GlmAsrForConditionalGeneration glmasr  GlmImageForConditionalGeneration -  GlmOcrForConditionalGeneration glm_ocr
    GraniteForCausalLM granite  GraniteMoeForCausalLM granitemoe  GraniteMoeSharedForCausalLM granitemoeshared
    HYV3ForCausalLM hy_v3  HunYuanDenseV1ForCausalLM hunyuan_v1_dense  HunYuanMoEV1ForCausalLM hunyuan_v1_moe
    IQuestCoderForCausalLM -  InternLM2ForCausalLM -  InternLM2ForRewardModel -  InternLM3ForCausalLM -
    InternS1ForConditionalGeneration -  InternS1ProForConditionalGeneration -  InternVLChatModel internvl_chat
    K2HorizonForCausalLM k2_horizon+  LightOnOCRForConditionalGeneration -
    LlamaEmbeddingModel -  LlamaForCausalLM llama  LlamaForClassification -  LlamaForSequenceClassification llama
    LlamaForSequenceClassificationWithNormal_Weights -
    LlavaForConditionalGeneration llava  LlavaLlamaForCausalLM -  LlavaMistralForCausalLM -  LlavaQwenForCausalLM -
    LlavaVidForCausalLM -  LocateAnythingForConditionalGeneration locateanything
    MiDashengLMModel -  MiMoForCausalLM -  MiMoV2ASRForCausalLM -  MiniCPMForCausalLM -  MiniCPMO -  MiniCPMV -
    MiniMaxM2ForCausalLM minimax_m2  Ministral3ForCausalLM ministral3
    Mistral3ForConditionalGeneration mistral3  MistralForCausalLM mistral  MistralModel mistral
    MixtralForCausalLM mixtral  MultiModalityCausalLM multi_modality
    NVILAForConditionalGeneration -  NVILALiteForConditionalGeneration -
    NanbeigeForCausalLM nanbeige  NanbeigeForSequenceClassification nanbeige
    OPTForCausalLM opt  Olmo2ForCausalLM olmo2  OlmoForCausalLM olmo  OlmoeForCausalLM olmoe  OrionForCausalLM -
    POINTSV15ChatModel -  PaddleOCRVLForConditionalGeneration paddleocr_vl  PersimmonForCausalLM persimmon
    Phi3ForCausalLM phi3  Phi3SmallForCausalLM -  Phi4MMForCausalLM -  PhiForCausalLM phi  PhiMoEForCausalLM -
    PixtralForConditionalGeneration -  QWenLMHeadModel -  QuantMixtralForCausalLM -
    Qwen2AudioForConditionalGeneration qwen2_audio  Qwen2ForCausalLM qwen2  Qwen2ForRewardModel -
    Qwen2ForSequenceClassification qwen2  Qwen2MoeForCausalLM qwen2_moe  Qwen2VLForConditionalGeneration qwen2_vl
    Qwen2_5_VLForConditionalGeneration qwen2_5_vl  Qwen3ASRForConditionalGeneration qwen3_asr
    Qwen3ForCausalLM qwen3  Qwen3ForRewardModel -  Qwen3ForSequenceClassification qwen3  Qwen3Model qwen3
    Qwen3MoeForCausalLM qwen3_moe  Qwen3OmniMoeForConditionalGeneration qwen3_omni_moe
    Qwen3VLForConditionalGeneration qwen3_vl  Qwen3VLMoeForConditionalGeneration qwen3_vl_moe
    Sarashina2VisionForCausalLM -  SarvamMoEForCausalLM -  SolarForCausalLM -  StableLmForCausalLM stablelm
    Starcoder2ForCausalLM starcoder2  Step3VLForConditionalGeneration step3_vl  StepVLForConditionalGeneration -
    TeleFLMForCausalLM -  TorchNativeLlamaForCausalLM -  TorchNativePhi3ForCausalLM -
    VoxtralForConditionalGeneration voxtral  XllmForCausalLM xllm+  XverseForCausalLM -  XverseMoeForCausalLM -
    YiVLForCausalLM -
    """
)

# some layers keep the states of gated delta nets or of Mamba-2
SERVED_HYBRIDS = _rows(
    """
    FalconH1ForCausalLM falcon_h1  GraniteMoeHybridForCausalLM granitemoehybrid
    InternS2PreviewForConditionalGeneration intern_s2_preview
    MiniCPMV4_6ForConditionalGeneration minicpmv4_6  MiniCPMV4_7ForConditionalGeneration minicpmv4_7
    NemotronHForCausalLM nemotron_h  NemotronH_Omni_Reasoning_V3 nemotron_h_omni
    Qwen3NextForCausalLM qwen3_next  Qwen3_5ForCausalLM qwen3_5_text
    Qwen3_5ForConditionalGeneration qwen3_5
    Qwen3_5MoeForCausalLM qwen3_5_moe_text  Qwen3_5MoeForConditionalGeneration qwen3_5_moe
    """
)
# some layers have a sliding window, in a pool of SGLang's own
SERVED_WINDOWS = _rows(
    """
    GptOssForCausalLM gpt_oss  LagunaForCausalLM laguna  MellumForCausalLM mellum
    Step3p5ForCausalLM step3p5  Step3p7ForConditionalGeneration step3p7
    """
)
# some layers have a sliding window, which is read from records
SERVED_WINDOWS_IN_RECORDS = _rows("Gemma3ForCausalLM gemma3_text")
# the same states, but SGLang has a prefix cache for them only if a page is one token
SERVED_UNCACHED = _rows(
    """
    NemotronH_Nano_Omni_Reasoning_V3 NemotronH_Nano_Omni_Reasoning_V3  NemotronH_Nano_VL_V2 NemotronH_Nano_VL_V2
    """
)
# by the word of the sentence
REFUSED = {
    "sliding-window layers": _rows(
        """
        BeamForCausalLM beam  Cohere2ForCausalLM cohere2  Cohere2MoeForCausalLM cohere2_moe
        Cohere2VisionForConditionalGeneration cohere2_vision
        DeepseekV4ForCausalLM deepseek_v4  DiffusionGemmaForBlockDiffusion diffusion_gemma
        Dots3NoteForCausalLM dots3_note+  EmbeddingGemma2Model embedding_gemma2
        Gemma2ForCausalLM gemma2  Gemma2ForSequenceClassification gemma2
        Gemma3ForConditionalGeneration gemma3
        Gemma3nForCausalLM gemma3n_text  Gemma3nForConditionalGeneration gemma3n
        Gemma4ForCausalLM gemma4_text  Gemma4ForConditionalGeneration gemma4
        Gemma4UnifiedForConditionalGeneration gemma4_unified
        GraniteMoeSWAForCausalLM granitemoe_swa  GraniteSWAForCausalLM granite_swa
        IQuestQ1ForCausalLM iquest_q1  InklingForConditionalGeneration inkling_mm_model
        Llama4ForConditionalGeneration llama4
        MiMoV2FlashForCausalLM -  MiMoV2ForCausalLM -
        MuseGlimmerForCausalLM -  MuseGlimmerForConditionalGeneration -  MuseSparkForConditionalGeneration -
        Spark2_5ForCausalLM spark2_5  UnlimitedOCRForCausalLM -
        """
    ),
    "attention backends of its own": _rows(
        "Exaone4ForCausalLM exaone4  ExaoneMoEForCausalLM -  ExaoneMoeForCausalLM exaone_moe"
    ),
    "states of a kind that is not tested": _rows(
        """
        FalconMambaForCausalLM falcon_mamba  InternS2MobiusForConditionalGeneration interns2_mobius
        JetNemotronForCausalLM jet_nemotron+  JetVLMForConditionalGeneration jet_vlm
        Lfm2BidirectionalModel lfm2  Lfm2ForCausalLM lfm2  Lfm2MoeForCausalLM lfm2_moe
        Lfm2VlForConditionalGeneration lfm2_vl
        Mamba2ForCausalLM mamba2  MambaForCausalLM mamba
        NemotronHPuzzleForCausalLM nemotron_h_puzzle+
        Qwen4ExpForConditionalGeneration qwen4_exp  ZayaForCausalLM zaya
        """
    ),
    "latent attention (MLA)": _rows(
        """
        BailingMoeV2_5ForCausalLM bailing_hybrid  BailingMoeV3ForCausalLM bailing_hybrid
        BailingMoeV3VLForConditionalGeneration bailing_moe_v3_vl
        DeepseekV2ForCausalLM deepseek_v2  DeepseekV32ForCausalLM deepseek_v32  DeepseekV3ForCausalLM deepseek_v3
        DeepseekVL2ForCausalLM deepseek_vl_v2  DotsVLMForCausalLM dots_vlm
        GigaChat35ForCausalLM gigachat3_5
        Glm4MoeLiteForCausalLM glm4_moe_lite  Glm5NextForConditionalGeneration glm5_next
        GlmMoeDsaForCausalLM glm_moe_dsa  HYV4ForCausalLM hy_v4
        KimiK3ForConditionalGeneration kimi_k3  KimiK3LinearForCausalLM kimi_linear+  KimiLinearForCausalLM kimi_linear+
        KimiK25ForConditionalGeneration kimi_k25  KimiVLForConditionalGeneration kimi_vl
        LongcatFlashForCausalLM longcat_flash  MiniCPM3ForCausalLM -
        MistralLarge3ForCausalLM deepseek_v3  SarvamMLAForCausalLM deepseek_v3
        """
    ),
    "sparse attention": _rows(
        """
        MiniCPMSALAForCausalLM minicpm_sala
        MiniMaxM3SparseForCausalLM -  MiniMaxM3SparseForConditionalGeneration minimax_m3_vl
        """
    ),
    "attention to later tokens": _rows(
        """
        BertForSequenceClassification bert  BertModel bert  CLIPModel clip  Contriever bert  EmbeddingGemmaModel -
        HrmTextForCausalLM hrm_text  LLaDA2MoeModelLM -  SDARForCausalLM -  SDARMoeForCausalLM -
        XLMRobertaForSequenceClassification xlm-roberta  XLMRobertaModel xlm-roberta
        """
    ),
    "cross attention": _rows(
        """
        MllamaForConditionalGeneration mllama  MossVLForConditionalGeneration -  WhisperForConditionalGeneration whisper
        """
    ),
    "chunked attention": _rows("Llama4ForCausalLM llama4_text"),
    "loops over its layers": _rows("IQuestLoopCoderForCausalLM -"),
    "a logit cap": _rows("Grok1ForCausalLM -  Grok1ModelForCausalLM -"),
    "ALiBi": _rows("BaichuanForCausalLM -"),
}

# beside the defaults of a row
CHANGES: dict[str, dict[str, Any]] = {
    "ArceeForCausalLM": {"head_dim": 128},
    "DeepseekV4ForCausalLM": {
        "num_hidden_layers": 2,
        "compress_ratios": [4, 128],
        "sliding_window": 128,
        "index_head_dim": 128,
    },
    "Dots3NoteForCausalLM": WINDOWS | LATENT,
    "ExaoneMoEForCausalLM": WINDOWS | {"sliding_window_pattern": "LG"},
    "Gemma4ForCausalLM": {"global_head_dim": 256},
    "Glm4MoeForCausalLM": {"head_dim": 128},
    "Glm4vMoeForConditionalGeneration": {"text_config": {"head_dim": 128}},
    "GlmImageForConditionalGeneration": {"vision_vocab_size": 512},
    "IQuestLoopCoderForCausalLM": {"loop_num": 2},
    "InternS2PreviewForConditionalGeneration": {"text_config": {"full_attention_interval": 4}},
    "JetVLMForConditionalGeneration": {"text_config": LLAMA},
    # without layer types all of them have full attention
    "LagunaForCausalLM": WINDOWS | {"num_hidden_layers": 2, "num_attention_heads_per_layer": [64, 48]},
    "MellumForCausalLM": WINDOWS | {"num_hidden_layers": 2},
    "KimiK3ForConditionalGeneration": {"text_config": LLAMA | LATENT | {"linear_attn_config": KDA}},
    "KimiK3LinearForCausalLM": LATENT,
    "KimiLinearForCausalLM": LATENT,
    "MiMoV2FlashForCausalLM": {"hybrid_layer_pattern": [0, 1], "sliding_window_size": 128},
    "MiMoV2ForCausalLM": {"hybrid_layer_pattern": [0, 1], "sliding_window_size": 128},
    "MiniCPM3ForCausalLM": LATENT,
    "MiniCPMV4_6ForConditionalGeneration": {"text_config": QWEN3_5},
    "MiniCPMV4_7ForConditionalGeneration": {"text_config": QWEN3_5},
    "MiniCPMSALAForCausalLM": {"sparse_config": {"topk": 64}},
    "MiniMaxM3SparseForConditionalGeneration": {"text_config": LLAMA, "vision_config": {}},
    "MistralLarge3ForCausalLM": LATENT,
    "MuseGlimmerForCausalLM": WINDOWS,
    "MuseGlimmerForConditionalGeneration": WINDOWS,
    "MuseSparkForConditionalGeneration": WINDOWS,
    "NemotronHPuzzleForCausalLM": {"block_configs": [{"block_type": "mamba"}, {"block_type": "attention"}]},
    "Phi3ForCausalLM": {"hidden_size": 4096},
    "Qwen3NextForCausalLM": {"full_attention_interval": 4},
    "Qwen3_5ForCausalLM": {"full_attention_interval": 4},
    "Qwen3_5ForConditionalGeneration": {"text_config": {"full_attention_interval": 4}},
    "Qwen3_5MoeForCausalLM": {"full_attention_interval": 4},
    "Qwen3_5MoeForConditionalGeneration": {"text_config": {"full_attention_interval": 4}},
    "Qwen3OmniMoeForConditionalGeneration": {"thinker_config": {"text_config": {"head_dim": 128}}},
    "SarvamMLAForCausalLM": LATENT,
    "StableLmForCausalLM": {"hidden_size": 2048},
    "Step3p5ForCausalLM": STEP,
    "Step3p7ForConditionalGeneration": {"text_config": STEP | {"model_type": "step3p5"}},
}

# loaded with --speculative-algorithm only, which is refused
DRAFTS = _names(
    """
    BailingMoeForCausalLMNextN DFlash2BeamDraftModel DFlash2DraftModel DFlashDraftModel DFlashLagunaForCausalLM
    DSparkDraftModel DSparkMiniMaxDraftModel DeepseekV3ForCausalLMNextN DeepseekV4ForCausalLMDSpark
    DeepseekV4ForCausalLMNextN Dots3NoteForCausalLMNextN Eagle3DeepseekV2ForCausalLM Ernie4_5_MoeForCausalLMMTP
    ExaoneMoEForCausalLMMTP Gemma4AssistantForCausalLM Gemma4UnifiedAssistantForCausalLM GigaChat35ForCausalLMNextN
    Glm4MoeForCausalLMNextN Glm4MoeLiteForCausalLMNextN Glm5NextForConditionalGenerationNextN
    GlmMoeDsaForCausalLMNextN GlmOcrForConditionalGenerationNextN HYV3ForCausalLMNextN HYV4ForCausalLMNextN IQuestQ1MTP
    InklingForConditionalGenerationMTP Lfm2DSparkDraftModel LiLiCorrDraftModel LingDSparkModel LlamaForCausalLMEagle
    LlamaForCausalLMEagle3 LongcatFlashForCausalLMNextN MiMoMTP MiMoV2MTP MiniMaxDFlash2DraftModel
    MistralForCausalLMEagle MistralLarge3ForCausalLMEagle MuseGlimmerAssistantModel NemotronHForCausalLMMTP
    Qwen2ForCausalLMEagle Qwen3DSparkModel Qwen3MoeForCausalLMMTP Qwen3NextForCausalLMMTP Qwen3_5ForCausalLMMTP
    Qwen4ExpForCausalLMMTP Step3p5MTP
    """
)

# no checkpoint names them: SGLang's way to models of transformers (`check_layers` judges those once they are loaded),
# to MindSpore on an NPU (--device is refused), and the vision part of Pixtral, which is not served alone
WRAPPERS = _names(
    """
    MindSporeForCausalLM PixtralVisionModel TransformersEmbeddingModel TransformersForCausalLM
    TransformersForSequenceClassification TransformersMoEEmbeddingModel TransformersMoEForCausalLM
    TransformersMoEForSequenceClassification TransformersMultiModalEmbeddingModel TransformersMultiModalForCausalLM
    TransformersMultiModalForSequenceClassification TransformersMultiModalMoEEmbeddingModel
    TransformersMultiModalMoEForCausalLM TransformersMultiModalMoEForSequenceClassification
    """
)
