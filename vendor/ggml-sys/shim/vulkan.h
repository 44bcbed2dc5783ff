// Put before every file of ggml-vulkan. It names three types of VK_EXT_layer_settings, to ask for the validation layer's
// advice when that layer is there; Vulkan's headers have them since 1.3.268, and Debian 12's are older. These have the
// layout that the extension prescribes.
#pragma once

#include <vulkan/vulkan_core.h>

#ifndef VK_EXT_layer_settings

#include <cstdint>
#include <vector>

namespace vk {

enum class LayerSettingTypeEXT { eBool32 = 0 };

struct LayerSettingEXT {
    const char * layer;
    const char * setting;
    LayerSettingTypeEXT type;
    uint32_t count;
    const void * values;
};

struct LayerSettingsCreateInfoEXT {
    explicit LayerSettingsCreateInfoEXT(const std::vector<LayerSettingEXT> & list)
        : count(static_cast<uint32_t>(list.size())), settings(list.data()) {}

    // VK_STRUCTURE_TYPE_LAYER_SETTINGS_CREATE_INFO_EXT
    VkStructureType type = static_cast<VkStructureType>(1000496000);
    const void * next = nullptr;
    uint32_t count;
    const LayerSettingEXT * settings;
};

static_assert(sizeof(LayerSettingTypeEXT) == sizeof(int), "a C enumeration's size");

}  // namespace vk

#endif
